"""How results look: data on stdout (a table, or JSON with `schema_version`), messages on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

SCHEMA_VERSION = 1
PIPE_WIDTH = 200

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def json_option(command: Decorated) -> Decorated:
    """Give a command `--json`; the value arrives as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def console(stderr: bool = False) -> Console:
    """A console for stdout or stderr. A pipe gets wide lines, so that no cell of a table is cut."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def print_json(data: dict[str, Any], *, compact: bool = False) -> None:
    """Print one JSON object, `schema_version` first. `compact` keeps it on one line."""
    document = {"schema_version": SCHEMA_VERSION, **data}
    click.echo(json.dumps(document, ensure_ascii=False, indent=None if compact else 2))


def say(message: str) -> None:
    """Print a message for the person on stderr."""
    console(stderr=True).print(message, style="dim", markup=False, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> None:
    """Print a table on stdout. The columns named in `right` are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in set(right) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns on stdout."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    console().print(table)


def format_bytes(count: float) -> str:
    """Decimal units with three significant digits: `0 B`, `4.1 kB`, `412 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def format_count(count: int) -> str:
    """Digits in groups of three: `18 432`."""
    return f"{count:,}".replace(",", " ")


def format_ms(milliseconds: float | None) -> str:
    """`8.4 ms`, `412 ms`, `1.24 s`, `14m02s`; `-` when unknown."""
    if milliseconds is None:
        return "-"
    if milliseconds < 999.5:
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def format_ago(epoch: float, now: float | None = None) -> str:
    """How long ago an epoch time was: `now`, `12s ago`, `2m ago`, `3h ago`, `5d ago`."""
    seconds = int((time.time() if now is None else now) - epoch)
    if seconds < 1:
        return "now"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"


def format_share(part: float, whole: float) -> str:
    """A percentage with one decimal, `-` when there is nothing to share."""
    return f"{100 * part / whole:.1f}" if whole else "-"
