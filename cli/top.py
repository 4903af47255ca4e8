"""`top`: who remembers what, and what the daemon does, as it changes."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agentmem.cli.output import (
    console,
    format_ago,
    format_bytes,
    format_count,
    format_ms,
    format_share,
    json_option,
    print_json,
)
from agentmem.client import AgentMemClient

COLUMNS = ("AGENT", "TOKENS", "RAM", "DISK", "STATE", "HIT%", "SAVED", "LAST")
SORTS = {
    "last": lambda agent: -agent["last_used"],
    "saved": lambda agent: -(agent["saved_ms"] or 0),
    "ram": lambda agent: -agent["ram_bytes"],
    "hit": lambda agent: -agent["cached_tokens"] / max(1, agent["prompt_tokens"]),
}


@click.command()
@click.option("--once", is_flag=True, help="Print one picture and end.")
@click.option(
    "--interval", type=click.FloatRange(0.2), default=1.0, show_default=True, help="Seconds between pictures."
)
@click.option(
    "--sort", type=click.Choice(sorted(SORTS)), default="last", show_default=True, help="What comes first."
)
@json_option
def top(once: bool, interval: float, sort: str, as_json: bool) -> None:
    """Watch the agents and the daemon, until Ctrl-C."""
    with AgentMemClient() as client:
        if as_json:
            print_json(_snapshot(client, sort))
            return
        screen = console()
        if once or not screen.is_terminal:
            screen.print(_picture(_snapshot(client, sort)))
            return
        with Live(console=screen, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    live.update(_picture(_snapshot(client, sort)), refresh=True)
                    time.sleep(interval)
            except KeyboardInterrupt:
                return


def _snapshot(client: AgentMemClient, sort: str) -> dict[str, Any]:
    agents = sorted(client.agents(), key=SORTS[sort])
    return {"health": client.health(), "store": client.store(), "agents": agents}


def _picture(now: dict[str, Any]) -> Group:
    health, ram, disk = now["health"], now["store"]["ram"], now["store"]["disk"]
    head = Text(
        f"{health['model']} · {health['active']} running, {health['waiting']} waiting · "
        f"RAM {format_bytes(ram['used_bytes'])} of {format_bytes(ram['capacity_bytes'])} · "
        f"disk {format_bytes(disk['extent_bytes'])} · {health['status']}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in COLUMNS:
        table.add_column(
            column, justify="left" if column in ("AGENT", "STATE", "LAST") else "right", no_wrap=True
        )
    for agent in now["agents"]:
        table.add_row(
            Text(agent["agent"]), format_count(agent["tokens"]), format_bytes(agent["ram_bytes"]),
            format_bytes(agent["disk_bytes"]), agent["state"], format_share(agent["cached_tokens"], agent["prompt_tokens"]),
            format_ms(agent["saved_ms"]), format_ago(agent["last_used"]),
        )  # fmt: skip
    return Group(head, table)
