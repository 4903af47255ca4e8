"""`jobs`: transcripts that are read in the background."""

from __future__ import annotations

from typing import Any

import click

from agentmem.cli.output import format_ago, format_count, json_option, print_json, print_table
from agentmem.client import AgentMemClient

COLUMNS = ("JOB", "AGENT", "SESSION", "STATE", "READ", "OF", "SINCE", "ERROR")


@click.command()
@click.option("--cancel", "job", metavar="ID", help="End this job. What was read stays.")
@json_option
def jobs(job: str | None, as_json: bool) -> None:
    """List what is read in the background (append --background), or end a job of it."""
    with AgentMemClient() as client:
        found = [client.cancel_job(job)] if job is not None else client.jobs()
    if as_json:
        print_json({"jobs": found})
    elif job is not None:
        click.echo(in_words(found[0]))
    elif not found:
        click.echo("no jobs; try: agentmem append AGENT FILE --background")
    else:
        print_table(COLUMNS, map(_row, found), right=("READ", "OF"))


def in_words(job: dict[str, Any]) -> str:
    """A job in a line."""
    total = job["tokens_total"]
    of = "" if total is None else f", {format_count(job['tokens_read'])} of {format_count(total)} tokens read"
    return f"{job['id']}: {job['state']}{of}"


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    total = job["tokens_total"]
    return (
        job["id"], job["agent"], job["session"], job["state"], format_count(job["tokens_read"]),
        "" if total is None else format_count(total), format_ago(job["created"]), job["error"] or "",
    )  # fmt: skip
