"""`logs`: the end of the daemon's log."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import click

from agentmem.cli.output import json_option, print_json
from agentmem.errors import Forbidden, NotFound
from agentmem.home import Home, default_home, private


@click.command()
@click.option("-n", "--lines", type=click.IntRange(0), default=50, show_default=True, help="Lines to print.")
@click.option("-f", "--follow", is_flag=True, help="Go on printing what is added, until Ctrl-C.")
@json_option
def logs(lines: int, follow: bool, as_json: bool) -> None:
    """Print the end of the daemon's log. It holds no text of prompts or replies."""
    path = Home(default_home()).log
    if as_json and follow:
        raise click.UsageError("--json prints one object, so it cannot --follow")
    try:
        offset, tail = _tail(path, lines)
    except FileNotFoundError:
        raise NotFound(f"no log at {path}; the first start makes it: agentmem up") from None
    except OSError as error:
        raise Forbidden(f"cannot read {path}: {error.strerror}") from error
    if as_json:
        print_json({"path": str(path), "lines": tail})
        return
    for line in tail:
        click.echo(line)
    if follow:
        _follow(path, offset)


def _tail(path: Path, lines: int) -> tuple[int, list[str]]:
    """The size of the file that was read, and its last `lines` lines."""
    with open(path, "rb", opener=private) as file:
        last = deque(file, maxlen=lines)
        return file.tell(), [line.decode("utf-8", "replace").rstrip("\r\n") for line in last]


def _follow(path: Path, offset: int) -> None:
    with open(path, encoding="utf-8", errors="replace", opener=private) as file:
        file.seek(offset)
        while True:
            if piece := file.read():
                click.echo(piece, nl=False)
            else:
                time.sleep(0.2)
