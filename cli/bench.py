"""`bench`: the benchmarks run as a program of their own, because they need the engine."""

from __future__ import annotations

import subprocess
import sys

import click


@click.group()
def bench() -> None:
    """Measure this machine. Every ratio is measured within one run."""


@bench.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def restore(arguments: tuple[str, ...]) -> None:
    """Time to the first token cold, hot and warm, next to stock mlx-lm caches.

    Takes --json and the options that `agentmem bench restore --help` lists.
    """
    command = [sys.executable, "-m", "agentmem.bench", "restore", *arguments]
    sys.exit(subprocess.call(command))
