"""`export`, `import`: one agent as one file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from agentmem.cli.output import console, format_bytes, format_count, json_option, print_json
from agentmem.client import AgentMemClient
from agentmem.transfers import Progress as Report

KEPT = {
    "state": "it continues where it was",
    "tokens": "its state is computed again at its next turn, because the model, the KV format or its calibration is another one",
    "messages": "only its messages are of use here, because the tokenizer or the chat template is another one",
}


@click.command("export")
@click.argument("agent")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
def export_agent(agent: str, file: Path, force: bool, as_json: bool) -> None:
    """Write everything an agent remembers into FILE, for another machine or for later.

    The file holds the agent's conversations in plain text and its attention state as it is stored. It is only readable for you.
    """
    with AgentMemClient() as client, Bytes(f"export {agent}") as bar:
        result = client.export(agent, file, force=force, progress=bar.report)
    if as_json:
        print_json({"agent": agent, **result})
    else:
        click.echo(f"{agent} is in {result['path']}, {format_bytes(result['bytes'])}")


@click.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--as", "name", metavar="NAME", help="Name of the agent here. Default: the one it had.")
@click.option(
    "--trust", is_flag=True, help="Let other agents continue from its state: you know who made FILE."
)
@click.option("--force", is_flag=True, help="Replace an agent of that name. What it remembers is deleted.")
@json_option
def import_agent(file: Path, name: str | None, trust: bool, force: bool, as_json: bool) -> None:
    """Make an agent of FILE, which `export` wrote here or elsewhere.

    Everything in FILE is checked, but nobody can check whether its attention state belongs to its text: the agent is as
    trustworthy as who made FILE. Its state is therefore kept apart from that of other agents, unless you pass --trust.
    """
    with AgentMemClient() as client, Bytes(f"import {file.name}") as bar:
        result = client.import_agent(file, name, trust=trust, force=force, progress=bar.report)
    if as_json:
        print_json(result)
        return
    info = result["agent"]
    click.echo(
        f"{info['agent']}: {format_count(info['tokens'])} tokens, {info['state']}; {KEPT[result['kept']]}"
    )


class Bytes:
    """A bar on stderr of how much of a file has passed; nothing where nobody watches."""

    def __init__(self, text: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            console=console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._task = self._progress.add_task(text, total=None)

    @property
    def report(self) -> Report:
        return lambda done, total: self._progress.update(self._task, completed=done, total=total)

    def __enter__(self) -> Bytes:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()
