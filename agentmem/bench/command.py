"""How a benchmark becomes a command: the options that several take, and how results are printed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import click

from agentmem.home import default_home

Result = dict[str, Any]
Option = Callable[[Any], Any]


def numbers(noun: str, example: str, least: int, most: int) -> Callable[..., list[int]]:
    def parse(_: click.Context, __: click.Parameter, value: str) -> list[int]:
        try:
            numbers = [int(v) for v in value.split(",")]
        except ValueError:
            raise click.BadParameter(f"give {noun} like {example}") from None
        if not all(least <= n <= most for n in numbers):
            raise click.BadParameter(f"{noun} lie between {least} and {most}")
        return numbers

    return parse


MODEL = click.option(
    "--model", default="embedded", help="Model to run: embedded, an MLX folder, a GGUF file or org/name."
)
SHAPE = click.option(
    "--shape", help="Random weights of a named architecture instead of a model, such as llama-3.1-8b."
)
BITS = click.option(
    "--bits", type=click.Choice(["4", "8", "16"]), default="4", help="Bits of the weights of --shape."
)
MEGABYTES = click.option("--megabytes", default=256, help="Size of the bandwidth measurement.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def tokens(default: str, help: str, least: int = 64) -> Option:
    parse = numbers("token counts", "1024,4096", least, 1 << 20)
    return click.option("--tokens", "lengths", default=default, callback=parse, help=help)


def batches(default: str, help: str) -> Option:
    parse = numbers("counts", "1,4,8", 1, 64)
    return click.option("--batch", "batches", default=default, callback=parse, help=help)


@click.group()
def bench() -> None:
    """Benchmarks that print ratios measured in one run."""


def benchmark(
    table: Callable[[Result], str], *options: Option
) -> Callable[[Callable[..., Result]], click.Command]:
    """Make a command of a function that measures: with these options and --json, it prints the result."""

    def declare(measure: Callable[..., Result]) -> click.Command:
        @functools.wraps(measure)
        def command(as_json: bool, **given: Any) -> None:
            result = measure(**given)
            click.echo(json.dumps(result) if as_json else table(result))

        for option in reversed((*options, JSON)):
            command = option(command)
        return bench.command()(command)

    return declare


def model_of(model: str, shape: str | None = None, bits: str = "4") -> Any:
    from agentmem.model.loaded import load
    from agentmem.model.random import shape_model

    return shape_model(shape, bits=int(bits)) if shape else load(model, default_home())


def say(text: str) -> None:
    click.echo(text, err=True)


def checks(result: dict[str, Any]) -> str:
    return "\n".join(
        f"{'ok  ' if c['holds'] else 'MISS'} {c['name']}: {c['value']:.3f} {c['unit']} (bound {c['bound']:.3f})"
        for c in result["checks"]
    )
