"""`bench`: the benchmarks run as a program of their own, because they need the engine."""

from __future__ import annotations

import subprocess
import sys

import click

BENCHMARKS = {
    "restore": "Time to the first token cold, hot and warm, next to stock mlx-lm caches.",
    "store": "What the block store makes of this disk: bandwidth, lookup, fork, opening after a crash.",
    "formats": "What each KV format costs the model's predictions.",
    "attention": "One decode step's attention over packed rows, next to 16-bit keys and values.",
    "batch": "Many streams at once: decode speed and memory, next to 16-bit pages and stock mlx-lm, and speed under load.",
    "compose": "What reusing segments behind other text costs the answers, and saves.",
    "layouts": "What works with the layers of each model type, tried on tiny random models.",
    "bytes": "What an agent takes in RAM and on disk, by model shape.",
    "http": "What HTTP adds to the time to first token.",
    "episodic": "Long conversations in a small budget: episodes, against the full cache and other ways to evict.",
}


@click.group()
def bench() -> None:
    """Measure this machine. Every ratio is measured within one run."""


def _command(name: str, about: str) -> click.Command:
    """Hands every argument, --help too, to the benchmark's own program."""

    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        sys.exit(subprocess.call([sys.executable, "-m", "agentmem.bench", name, *arguments]))

    return click.command(
        name,
        help=f"{about}\n\nTakes --json and the options that `agentmem bench {name} --help` lists.",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
        add_help_option=False,
    )(run)


for name, about in BENCHMARKS.items():
    bench.add_command(_command(name, about))
