"""What `verify --composed` has found."""

from __future__ import annotations

from typing import Any

import click

from agentmem.cli.output import print_json, print_table

COLUMNS = ("TEMPLATE", "AGENTS", "PLANNER", "PAIRS", "MEAN KL", "FIRST KL", "TOP-1", "VERDICT")


def tell_composed(found: dict[str, Any], as_json: bool) -> None:
    """Print what was measured of every template."""
    if as_json:
        print_json(found)
        return
    if not found["templates"]:
        click.echo("no prompt has taught anything yet; agents made with --reuse composed or auto teach")
        return
    print_table(COLUMNS, map(_row, found["templates"]), right=("PAIRS", "MEAN KL", "FIRST KL", "TOP-1"))
    bounds = found["bounds"]
    click.echo(f"--reuse auto asks for {bounds['pairs']} pairs with a mean KL of {bounds['kl']} nats at most")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    figures = [f"{row[name]:.4f}" if row[name] is not None else "-" for name in ("kl", "first_kl", "top1")]
    agents = ", ".join(row["agents"][:3]) + (" ..." if len(row["agents"]) > 3 else "")
    return row["template"][:8], agents, row["planner"], str(row["pairs"]), *figures, row["verdict"]
