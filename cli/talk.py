"""`run` and `chat`: talk with an agent that remembers the conversation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from agentmem.cli.output import format_count, format_ms, json_option, print_json, say
from agentmem.cli.text_input import read_text
from agentmem.client import AgentMemClient, ChatResult, ChatStream
from agentmem.compose.reuse import PLANNERS

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--session", help="Session of the agent. Default: its default session."),
    click.option("--ephemeral", is_flag=True, help="A new agent that never touches the disk."),
    click.option(
        "--reuse",
        type=click.Choice(["exact", "composed", "auto", "off"]),
        help="What of remembered state this turn may use. Default: as the agent is made.",
    ),
    click.option(
        "--planner",
        type=click.Choice(PLANNERS),
        help="How it is composed, where it may be. Default: as the agent is made.",
    ),
    click.option("--system", help="System message in front of this turn; meant for a new session."),
    click.option("--max-tokens", type=click.IntRange(1), help="Tokens of a reply at most."),
    click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token."),
)


def talk_options(command: Decorated) -> Decorated:
    """The options that `run` and `chat` share."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("agent")
@click.argument("text")
@talk_options
@json_option
def run(agent: str, text: str, as_json: bool, **options: Any) -> None:
    """Say TEXT (- is standard input) to AGENT and print the reply. The agent remembers both."""
    text = read_text(sys.stdin) if text == "-" else text
    if not text.strip():
        raise click.UsageError("TEXT is empty")
    with AgentMemClient() as client:
        result = _turn(client, agent, text, options, aloud=not as_json)
    _report(agent, result, as_json, compact=False)


@click.command()
@click.argument("agent")
@talk_options
@json_option
def chat(agent: str, as_json: bool, **options: Any) -> None:
    """Talk with AGENT line by line, until the end of input (Ctrl-D).

    Ctrl-C stops a reply, and at the prompt it leaves. With --json each reply is one JSON object on a line.
    """
    with AgentMemClient() as client:
        client.health()
        while (line := _ask(agent)) is not None:
            if not line.strip():
                continue
            try:
                result = _turn(client, agent, line, options, aloud=not as_json)
            except KeyboardInterrupt:
                say("\nreply stopped")
            else:
                _report(agent, result, as_json, compact=True)
            options["system"] = None


def _ask(agent: str) -> str | None:
    """The next line of input, None at its end. A terminal gets a prompt and line editing."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    try:
        return input(f"{agent}> ")
    except EOFError:
        return None


def _turn(client: AgentMemClient, agent: str, text: str, options: dict[str, Any], aloud: bool) -> ChatResult:
    messages = [{"role": "user", "content": text}]
    if options.get("system"):
        messages.insert(0, {"role": "system", "content": options["system"]})
    named = ("max_tokens", "temperature", "reuse", "planner")
    request = {name: options[name] for name in named if options[name] is not None}
    if options["ephemeral"]:
        request["persist"] = False
    stream: ChatStream = client.stream_chat(
        agent, messages, session=options["session"], history="server", **request
    )
    with stream:
        for piece in stream:
            if aloud:
                click.echo(piece, nl=False)
    if aloud:
        click.echo()
    return stream.result


def _report(agent: str, result: ChatResult, as_json: bool, compact: bool) -> None:
    if not as_json:
        say(_memory_line(result))
        return
    reply = {"agent": agent, "text": result.text, "finish_reason": result.finish_reason}
    print_json({**reply, "model": result.model, "usage": result.usage}, compact=compact)


def _memory_line(result: ChatResult) -> str:
    memory = result.memory
    prompt = result.usage.get("prompt_tokens", 0)
    return (
        f"{memory.get('state_before', 'cold')} · {format_count(result.cached_tokens)} of "
        f"{format_count(prompt)} tokens remembered{_composed(result)} · first token after {format_ms(memory.get('ttft_ms'))}"
        + ("" if memory.get("committed") else " · not on disk yet")
    )


def _composed(result: ChatResult) -> str:
    return f", {format_count(result.composed_tokens)} composed" if result.composed_tokens else ""
