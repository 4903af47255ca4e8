"""`doc`: texts that are registered under a name, to be named in prompts and looked for in them."""

from __future__ import annotations

from pathlib import Path

import click

from agentmem.cli.output import format_count, json_option, print_json, print_table
from agentmem.client import AgentMemClient
from agentmem.errors import BadRequest


@click.group()
def doc() -> None:
    """Register texts under a name, so that prompts may name them and agents share them."""


@doc.command("add")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--as", "name", help="The document's name. Default: that of the file. For one file.")
@json_option
def doc_add(files: tuple[Path, ...], name: str | None, as_json: bool) -> None:
    """Register text files."""
    if name is not None and len(files) > 1:
        raise click.UsageError("--as names one document; give one file")
    found = []
    with AgentMemClient() as client:
        for file in files:
            found.append(client.register_document(name or file.name, _text(file)))
    if as_json:
        print_json({"documents": found})
        return
    for one in found:
        click.echo(f"{one['name']}: {format_count(one['tokens'])} tokens")


@doc.command("ls")
@json_option
def doc_ls(as_json: bool) -> None:
    """List the documents."""
    with AgentMemClient() as client:
        found = client.documents()
    if as_json:
        print_json({"documents": found})
    else:
        rows = [(one["name"], format_count(one["tokens"])) for one in found]
        print_table(("DOCUMENT", "TOKENS"), rows, right=("TOKENS",))


@doc.command("show")
@click.argument("name")
@json_option
def doc_show(name: str, as_json: bool) -> None:
    """Print a document's text."""
    with AgentMemClient() as client:
        found = client.document(name)
    if as_json:
        print_json(found)
    else:
        click.echo(found["text"])


@doc.command("rm")
@click.argument("name")
@json_option
def doc_rm(name: str, as_json: bool) -> None:
    """Take a document's name away. What agents remember of its text stays."""
    with AgentMemClient() as client:
        found = client.unregister_document(name)
    if as_json:
        print_json(found)
    else:
        click.echo(f"{name} is no document any more")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"{file} is not UTF-8 text") from None
