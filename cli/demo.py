"""`demo`: three agents, a crash, and the proof that nothing was forgotten."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from agentmem.cli.demo_agents import demo_agents
from agentmem.cli.demo_run import Outcome, run_demo, step_count
from agentmem.cli.exits import Exit
from agentmem.cli.output import (
    format_bytes,
    format_count,
    format_ms,
    json_option,
    print_json,
    print_table,
    say,
)
from agentmem.cli.progress import Steps

COLUMNS = ("AGENT", "TOKENS", "COLD", "HOT", "WARM", "SPEED-UP", "ON DISK", "FP16", "Q4/FP16")


@click.command()
@click.option("--model", default="embedded", show_default=True, help="As for `up`.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="A new or empty folder for the demo's homes, kept afterwards.",
)
@json_option
@click.pass_context
def demo(ctx: click.Context, model: str, keep: Path | None, as_json: bool) -> None:
    """Three agents read, answer, survive kill -9, and answer as if nothing had happened.

    Runs daemons of its own on temporary homes; a daemon of yours is not touched. Each agent is asked a
    question cold, the next one hot, and after the daemon was killed with SIGKILL and started again the last
    one warm. Then the same conversations run without a crash, and every greedy reply must be the same. Exit
    code 1 when not.
    """
    cast = demo_agents()
    with _folder(keep) as folder, Steps(step_count(cast)) as steps:
        outcomes = run_demo(folder, cast, model, steps)
    identical = all(outcome.identical for outcome in outcomes)
    if as_json:
        rows = [outcome.as_json() for outcome in outcomes]
        print_json({"agents": rows, "identical": identical, "model": model})
    else:
        _print(outcomes, identical)
    if keep is not None:
        say(f"kept: {keep}")
    ctx.exit(Exit.OK if identical else Exit.FAILURE)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="agentmem-demo-") as name:
            yield Path(name)
        return
    if keep.exists() and any(keep.iterdir()):
        raise click.UsageError(f"{keep} is not empty; --keep wants a new or empty folder")
    keep.mkdir(parents=True, exist_ok=True, mode=0o700)
    yield keep.absolute()


def _print(outcomes: list[Outcome], identical: bool) -> None:
    print_table(COLUMNS, (_row(outcome.as_json()) for outcome in outcomes), right=COLUMNS[1:])
    click.echo()
    for outcome in outcomes:
        last = outcome.crashed.turns[-1]
        click.echo(f"{outcome.crashed.agent.name}, after the crash: {last.question}\n  {last.reply.strip()}")
    click.echo()
    replies = sum(len(outcome.crashed.turns) for outcome in outcomes)
    if identical:
        click.echo(f"identical: all {replies} greedy replies equal those of an uninterrupted run")
        return
    for outcome in outcomes:
        for ours, theirs in zip(outcome.crashed.replies, outcome.uninterrupted.replies, strict=True):
            if ours != theirs:
                click.echo(f"DIFFERENT, {outcome.crashed.agent.name}: {ours!r} is not {theirs!r}")


def _row(agent: dict[str, Any]) -> tuple[str, ...]:
    return (
        agent["name"],
        format_count(agent["tokens"]),
        format_ms(agent["cold_ttft_ms"]),
        format_ms(agent["hot_ttft_ms"]),
        format_ms(agent["warm_ttft_ms"]),
        f"{agent['speedup_warm']:.1f}x",
        format_bytes(agent["bytes_q4"]),
        format_bytes(agent["bytes_fp16"]),
        f"{agent['bytes_q4'] / agent['bytes_fp16']:.2f}" if agent["bytes_fp16"] else "-",
    )
