"""`df` and `prune`: what state takes, and how to get room."""

from __future__ import annotations

import re
from typing import Any

import click

from agentmem.cli.output import format_bytes, json_option, print_facts, print_json, print_table
from agentmem.client import AgentMemClient

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Age(click.ParamType):
    """A length of time such as 30d, 12h or 90m, in seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", str(value))
        if found is None:
            self.fail(f"{value!r} is no age; write for example 30d, 12h or 90m", param, ctx)
        return float(found[1]) * UNITS[found[2]]


@click.command()
@json_option
def df(as_json: bool) -> None:
    """Show what state takes in RAM and on disk, and within which budgets."""
    with AgentMemClient() as client:
        store = client.store()
    if as_json:
        print_json(store)
        return
    ram, disk = store["ram"], store["disk"]
    budget = format_bytes(disk["budget_bytes"]) if disk["budget_bytes"] else "no limit"
    print_facts(
        [
            ("RAM", f"{format_bytes(ram['used_bytes'])} of {format_bytes(ram['capacity_bytes'])}"),
            ("disk", f"{format_bytes(disk['bytes'])} of {budget}"),
            ("free on the disk", f"{format_bytes(disk['free_bytes'])}, {format_bytes(disk['floor_bytes'])} stay free"),
            ("state", f"{format_bytes(store['unique_bytes'])} unique "
                      f"({format_bytes(store['without_sharing_bytes'])} without sharing)"),
            ("index", format_bytes(disk["index_bytes"])),
            ("exceeded", disk["exceeded"] or "nothing"),
        ]
    )  # fmt: skip
    rows = [
        (name, str(s["agents"]), format_bytes(s["unique_bytes"]), format_bytes(s["without_sharing_bytes"]))
        for name, s in sorted(store["namespaces"].items())
    ]
    if rows:
        columns = ("NAMESPACE", "AGENTS", "UNIQUE", "WITHOUT SHARING")
        print_table(columns, rows, right=columns[1:])


@click.command()
@click.option("--older", type=Age(), required=True, help="Agents not used for so long, for example 30d.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def prune(older: float, dry_run: bool, as_json: bool) -> None:
    """Drop from disk the state of agents that were not used for long, and state that no session leads to.

    Tokens, lineage and pinned agents stay: a pruned agent is read again when it speaks.
    """
    with AgentMemClient() as client:
        result = client.prune(older, dry_run=dry_run)
    if as_json:
        print_json(result)
        return
    names = ", ".join(result["agents"]) or "no agent"
    verb = "would be freed" if dry_run else "freed"
    click.echo(f"{format_bytes(result['bytes'])} {verb}; state of {names}")
