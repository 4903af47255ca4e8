"""`bench`: the benchmarks run as a program of their own, because they need the engine."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NoReturn

import click

PASSED_ON: dict[str, Any] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    "add_help_option": False,
}


@click.group()
def bench() -> None:
    """Measure this machine. Every ratio is measured within one run."""


@bench.command(**PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def restore(arguments: tuple[str, ...]) -> None:
    """Time to the first token cold, hot and warm, next to stock mlx-lm caches.

    Takes --json and the options that `agentmem bench restore --help` lists.
    """
    _run("restore", arguments)


@bench.command(**PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def store(arguments: tuple[str, ...]) -> None:
    """What the block store makes of this disk: bandwidth, lookup, fork, opening after a crash.

    Takes --json and the options that `agentmem bench store --help` lists.
    """
    _run("store", arguments)


@bench.command(**PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def formats(arguments: tuple[str, ...]) -> None:
    """What each KV format costs the model's predictions.

    Takes --json and the options that `agentmem bench formats --help` lists.
    """
    _run("formats", arguments)


@bench.command(**PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def attention(arguments: tuple[str, ...]) -> None:
    """One decode step's attention over packed rows, next to 16-bit keys and values.

    Takes --json and the options that `agentmem bench attention --help` lists.
    """
    _run("attention", arguments)


@bench.command(**PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def batch(arguments: tuple[str, ...]) -> None:
    """Many streams at once: decode speed and memory, next to 16-bit pages and stock mlx-lm, and speed under load.

    Takes --json and the options that `agentmem bench batch --help` lists.
    """
    _run("batch", arguments)


def _run(name: str, arguments: tuple[str, ...]) -> NoReturn:
    sys.exit(subprocess.call([sys.executable, "-m", "agentmem.bench", name, *arguments]))
