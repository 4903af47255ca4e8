"""`verify` and `repair`: is what is kept as it was written, and what to do when it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click
from filelock import FileLock, Timeout

from agentmem.cli.calibration import tell_composed
from agentmem.cli.exits import Exit
from agentmem.cli.output import console, format_bytes, format_count, json_option, print_json
from agentmem.client import AgentMemClient
from agentmem.compose.reuse import DEFAULT, PLANNERS
from agentmem.daemon import running_daemon
from agentmem.errors import AlreadyRunning, StoreError
from agentmem.home import Home, default_home

PATIENCE_S = 86400.0  # a large store takes long to read


@click.command()
@click.argument("model", required=False)
@click.option("--formats", help="With MODEL: the KV formats to measure, such as q4,k8v4.")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="With MODEL: a text to measure on; repeatable.",
)
@click.option("--quick", is_flag=True, help="With MODEL: few texts and cases.")
@click.option("--deep", is_flag=True, help="Read every byte, and compare tokens with the index.")
@click.option(
    "--rebuild", is_flag=True, help="Make a new index from the files: at once, or at the daemon's next start."
)
@click.option(
    "--composed",
    is_flag=True,
    help="Measure composed prompts against dense ones instead; for `--reuse auto`.",
)
@click.option(
    "--planner",
    type=click.Choice(PLANNERS),
    help=f"With --composed: how they are composed. Default: {DEFAULT}.",
)
@json_option
def verify(
    model: str | None, formats: str | None, data: tuple[str, ...], quick: bool, deep: bool, rebuild: bool,
    composed: bool, planner: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Check the index and the extents, with a running daemon or without. Exit code 6 when something is damaged.

    With MODEL, such as `embedded`: measure what KV formats cost that model's answers, and keep the verdict.
    """
    if model is not None:
        if deep or rebuild or composed:
            raise click.UsageError("--deep, --rebuild and --composed are for what is kept, not for a model")
        chosen = ["--formats", formats] if formats else []
        flags = [*chosen, *(x for text in data for x in ("--data", text)), *(["--quick"] if quick else [])]
        return _measured(model, *flags, *(["--json"] if as_json else []))
    if formats or data or quick:
        raise click.UsageError(
            "--formats, --data and --quick need a MODEL, such as `agentmem verify embedded`"
        )
    if planner and not composed:
        raise click.UsageError("--planner needs --composed")
    if composed:
        if deep or rebuild:
            raise click.UsageError("--composed goes alone")
        with AgentMemClient(timeout=PATIENCE_S) as client, console(stderr=True).status("comparing prompts"):
            found = client.verify_composed(planner=planner)
        tell_composed(found, as_json)
        return 0
    home = Home(default_home())
    with console(stderr=True).status("reading what is kept"):
        if running_daemon(home) is not None:
            with AgentMemClient(timeout=PATIENCE_S) as client:
                report = client.verify(deep=deep, rebuild=rebuild)
        else:
            report = _offline(home, *(["--deep"] if deep else []), *(["--rebuild"] if rebuild else []))
    return _tell(report, as_json)


@click.command()
@click.option("--purge", is_flag=True, help="Empty the quarantine folder, too.")
@json_option
def repair(purge: bool, as_json: bool) -> int:
    """Put damaged extents aside, so that their tokens are read anew, and rebuild a damaged index.

    The index of a running daemon is rebuilt at its next start.
    """
    home = Home(default_home())
    with console(stderr=True).status("reading every byte"):
        if running_daemon(home) is not None:
            with AgentMemClient(timeout=PATIENCE_S) as client:
                report = client.repair(purge=purge)
        else:
            report = _offline(home, "--repair", *(["--purge"] if purge else []))
    return _tell(report, as_json)


def _measured(model: str, *flags: str) -> int:
    """Measure a model, in a process of its own: it needs the engine's libraries."""
    return subprocess.call([sys.executable, "-m", "agentmem.bench", "verify", "--model", model, *flags])


def _offline(home: Home, *flags: str) -> dict[str, Any]:
    """Look at a home that no daemon holds, in a process of its own: it needs the engine's libraries.

    Raises AlreadyRunning when a daemon holds it after all, StoreError when the look-over fails.
    """
    lock = FileLock(home.prepare().lock, mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AlreadyRunning(f"{home.root} is held by a daemon that is starting or ending") from None
    try:
        command = [
            sys.executable,
            "-m",
            "agentmem.blockpool.verify",
            str(home.store),
            "--keys",
            str(home.keys),
        ]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    finally:
        lock.release()
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise StoreError(f"the store could not be looked over: {last}")
    return dict(json.loads(done.stdout))


def _tell(report: dict[str, Any], as_json: bool) -> int:
    """Print a report; returns the exit code: what is damaged and was not mended counts."""
    mended = report.get("rebuilt") is not None or (
        report.get("quarantined") is not None and not report["index"]
    )
    if as_json:
        print_json(report)
    else:
        _print(report)
    return Exit.OK if report["ok"] or mended else Exit.INTEGRITY


def _print(report: dict[str, Any]) -> None:
    read = (
        f", {format_bytes(report['bytes'])} read" if report["deep"] else ", headers only (--deep reads all)"
    )
    click.echo(
        f"{format_count(report['extents'])} extents and {format_count(report['rows'])} rows of the index{read}"
    )
    for fault in report["index"]:
        click.echo(f"index: {fault}")
    for name, fault in report["bad"].items():
        click.echo(f"extent {name[:12]}: {fault}")
    for name in report["missing"]:
        click.echo(f"extent {name[:12]}: its file is missing")
    if report["orphans"]:
        click.echo(f"{len(report['orphans'])} files belong to no turn; the next start removes them")
    if rebuilt := report.get("rebuilt"):
        put_aside = len(rebuilt["bad"]) + len(rebuilt["unused"])
        click.echo(
            f"index rebuilt: {rebuilt['agents']} agents, {rebuilt['turns']} turns, {rebuilt['lost_turns']} lost; "
            f"{put_aside} extents put aside"
        )
    if report.get("rebuild"):
        click.echo("the index will be rebuilt at the next start: agentmem down && agentmem up")
    if report.get("quarantined"):
        click.echo(f"{report['quarantined']} extents put aside; their tokens are read anew")
    if report.get("purged_bytes") is not None:
        click.echo(f"quarantine emptied: {format_bytes(report['purged_bytes'])} freed")
    click.echo(
        "everything is as it was written" if report["ok"] else "something is damaged; see: agentmem repair"
    )
