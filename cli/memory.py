"""`memory` and `episodes`: how much of its past an agent keeps at hand, and what that past is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from agentmem.cli.output import format_bytes, format_count, json_option, print_json, print_table
from agentmem.client import AgentMemClient

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

KINDS = click.Choice(["full", "episodic", "window"])
COLUMNS = ("EPISODE", "TITLE", "SEGMENTS", "TOKENS", "BYTES", "THROUGH", "STATE", "HITS")
NEEDS = {"episodic": "budget_tokens", "window": "recent"}
TAKES = {
    "full": set(),
    "episodic": {"budget_tokens", "block_tokens", "episodes"},
    "window": {"recent", "sinks"},
}


def size_options(command: Decorated) -> Decorated:
    """Give a command the sizes of memory policies; they arrive under the names of the options."""
    for name, text in (
        ("--sinks", "Of window: the first tokens that it keeps. Default: 4."),
        ("--recent", "Of window: the newest tokens that it keeps."),
        ("--episodes", "Of episodic: how many there are. Default: by the length of the conversation."),
        (
            "--block-tokens",
            "Of episodic: newest tokens beside an episode before they compete. Default: 1024.",
        ),
        ("--budget-tokens", "Of episodic: tokens of an episode that it keeps."),
    ):
        command = click.option(name, type=int, help=text)(command)
    return command


def policy_from(kind: str | None, **sizes: int | None) -> dict[str, Any] | None:
    """The policy that options ask for; None where they ask for none. Raises click.UsageError."""
    given = {name: size for name, size in sizes.items() if size is not None}
    wrong = sorted(given.keys() - (TAKES[kind] if kind else set()))
    if wrong:
        option = f"--{wrong[0].replace('_', '-')}"
        raise click.UsageError(
            f"{option} says nothing of {kind} memory" if kind else f"{option} needs --memory"
        )
    if kind in NEEDS and NEEDS[kind] not in given:
        raise click.UsageError(f"{kind} memory needs --{NEEDS[kind].replace('_', '-')}")
    return None if kind is None else {"kind": kind, **given}


def in_words(policy: dict[str, Any]) -> str:
    """A policy as a person reads it."""
    if policy["kind"] == "episodic":
        count = f", {policy['episodes']} episodes" if policy["episodes"] else ""
        return f"episodic, {format_count(policy['budget_tokens'])} tokens of an episode{count}"
    if policy["kind"] == "window":
        return f"window, the first {policy['sinks']} and the newest {format_count(policy['recent'])} tokens"
    return "full"


@click.command()
@click.argument("agent")
@click.argument("kind", type=KINDS)
@size_options
@json_option
def memory(agent: str, kind: str, as_json: bool, **sizes: int | None) -> None:
    """Change how much of its past an agent keeps at hand. Its messages and tokens stay, whatever is asked.

    full keeps all of it. episodic keeps the episode of the conversation that a turn is about, and the newest tokens.
    window keeps the first tokens and the newest ones.
    """
    policy = policy_from(kind, **sizes)
    with AgentMemClient() as client:
        info = client.set_policy(agent, policy=policy)
    if as_json:
        print_json({"agent": info})
    else:
        click.echo(f"{info['agent']}: memory {in_words(info['policy'])}")


@click.command()
@click.argument("agent")
@click.option("--session", help="Session of the agent. Default: the one used last.")
@json_option
def episodes(agent: str, session: str | None, as_json: bool) -> None:
    """List the episodes of an agent's conversation, and what of it is at hand.

    TOKENS and BYTES are of the rows that are kept of an episode, chosen when the conversation had THROUGH tokens. STATE is hot
    (in RAM), warm (on disk) or cold (nothing is kept yet). The episode that the last turn used has a star;
    a conversation that is too short for several is one, called all.
    """
    with AgentMemClient() as client:
        found = client.episodes(agent, session)
    if as_json:
        print_json(found)
        return
    if found["episodes"]:
        right = ("SEGMENTS", "TOKENS", "BYTES", "THROUGH", "HITS")
        print_table(COLUMNS, map(_row, found["episodes"]), right=right)
    click.echo(
        f"{found['agent']}, session {found['session']}: memory {in_words(found['policy'])} · "
        f"{format_count(found['tokens'])} tokens said, {format_count(found['resident_tokens'])} in RAM, "
        f"{format_count(found['evicted_tokens'])} left out"
    )


def _row(episode: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{episode['id'] if episode['id'] >= 0 else 'all'}{' *' if episode['active'] else ''}",
        episode["title"] or "-",
        format_count(episode["segments"]),
        format_count(episode["tokens"]),
        format_bytes(episode["bytes"]),
        format_count(episode["built_through"]),
        episode["state"],
        format_count(episode["hits"]),
    )
