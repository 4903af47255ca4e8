"""`python -m agentmem.bench restore|store|formats ...`: what `agentmem bench` runs. JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from agentmem.home import Home, default_home


def _say(text: str) -> None:
    click.echo(text, err=True)


def _lengths(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    try:
        lengths = [int(v) for v in value.split(",")]
    except ValueError:
        raise click.BadParameter("give token counts like 1024,4096") from None
    if not all(64 <= n <= 1 << 20 for n in lengths):
        raise click.BadParameter("token counts lie between 64 and 1048576")
    return lengths


def _counts(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    try:
        counts = [int(v) for v in value.split(",")]
    except ValueError:
        raise click.BadParameter("give counts like 1,4,8") from None
    if not all(1 <= n <= 64 for n in counts):
        raise click.BadParameter("counts lie between 1 and 64")
    return counts


@click.group()
def bench() -> None:
    """Benchmarks that print ratios measured in one run."""


@bench.command()
@click.option(
    "--model", default="embedded", help="Model to run: embedded, an MLX folder, a GGUF file or org/name."
)
@click.option(
    "--shape", help="Random 4-bit weights of a named architecture instead of a model, such as llama-3.1-8b."
)
@click.option(
    "--tokens", "lengths", default="1024", callback=_lengths, help="Context lengths, such as 1024,4096."
)
@click.option("--chunk", default=512, help="Prefill chunk in tokens.")
@click.option("--repeats", default=3, help="Hot and warm turns per length; medians are reported.")
@click.option("--megabytes", default=256, help="Size of the bandwidth measurement.")
@click.option("--drop-cache", is_flag=True, help="Drop the page cache of the extents before every warm turn.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def restore(
    model: str,
    shape: str | None,
    lengths: list[int],
    chunk: int,
    repeats: int,
    megabytes: int,
    drop_cache: bool,
    as_json: bool,
) -> None:
    """Time to first token cold, hot and warm, restore bandwidth, and the same through stock mlx-lm."""
    from agentmem.bench.restore import run
    from agentmem.model.loaded import load
    from agentmem.model.random import shape_model

    loaded = shape_model(shape) if shape else load(model, default_home())
    result = run(
        loaded, lengths, chunk=chunk, repeats=repeats, drop_cache=drop_cache, megabytes=megabytes, say=_say
    )
    click.echo(json.dumps(result, indent=None if as_json else 2) if as_json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']} on {result['backend']}; restore {result['bandwidth']['restore_gb_s']:.1f} GB/s, "
        f"pread {result['bandwidth']['pread_gb_s']:.1f}, mx.load {result['bandwidth']['mx_load_gb_s']:.1f}",
        "tokens   cold ms    hot ms   warm ms  speed-up  bytes/fp16  stock q4 ms  stock speed-up",
    ]
    for r in result["rows"]:
        q4 = r["stock"]["q4"]
        lines.append(
            f"{r['tokens']:6d} {r['cold_ttft_ms']:9.0f} {r['hot_ttft_ms']:9.1f} {r['warm_ttft_ms']:9.1f} "
            f"{r['speedup_warm']:8.1f}x {r['bytes_ratio']:11.3f} {q4['warm_ms']:12.1f} {q4['speedup']:14.1f}x"
        )
    return "\n".join([*lines, _checks(result)])


def _checks(result: dict[str, Any]) -> str:
    return "\n".join(
        f"{'ok  ' if c['holds'] else 'MISS'} {c['name']}: {c['value']:.3f} {c['unit']} (bound {c['bound']:.3f})"
        for c in result["checks"]
    )


@bench.command()
@click.option("--pages", default=100_000, help="Pages of the large home.")
@click.option("--agents", default=1000, help="Agents of the large home.")
@click.option("--turns", default=200, help="Turns of the long session.")
@click.option("--steps", default=400, help="Decode steps that are timed.")
@click.option("--megabytes", default=256, help="Size of the bandwidth measurement.")
@click.option("--repeats", default=5, help="Rounds of which medians are reported.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def store(
    pages: int, agents: int, turns: int, steps: int, megabytes: int, repeats: int, as_json: bool
) -> None:
    """Put and restore bandwidth, long sessions, delays of decoding, lookup, fork, and opening after a crash."""
    from agentmem.bench.store import run

    result = run(
        pages=pages, agents=agents, turns=turns, steps=steps, megabytes=megabytes, repeats=repeats, say=_say
    )
    click.echo(json.dumps(result) if as_json else _checks(result))


@bench.command()
@click.option("--heads", default=8, help="KV heads.")
@click.option("--query-heads", default=32, help="Query heads.")
@click.option("--dim", default=128, help="Head size.")
@click.option("--format", default="q4-plain", help="KV format.")
@click.option(
    "--batch", "batches", default="1,8", callback=_counts, help="Sequences at once, such as 1,8,16."
)
@click.option(
    "--tokens",
    "lengths",
    default="4096,32768",
    callback=_lengths,
    help="Context lengths, such as 4096,32768.",
)
@click.option("--repeats", default=5, help="Graphs of which the median is reported.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def attention(as_json: bool, **options: Any) -> None:
    """One decode step's attention: fused over packed rows, against SDPA over 16-bit keys and values."""
    from agentmem.bench.attention import run

    result = run(**options, say=_say)
    click.echo(json.dumps(result) if as_json else _checks(result))


@bench.command()
@click.option(
    "--model", default="embedded", help="Model to run: embedded, an MLX folder, a GGUF file or org/name."
)
@click.option("--format", "names", multiple=True, help="A format to measure; repeatable. Default: all.")
@click.option(
    "--text", "files", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text to measure on; repeatable. Default: four texts of this project's own.",
)  # fmt: skip
@click.option("--history", default=640, help="Tokens of a text that are held in the format.")
@click.option("--next", "fed", default=128, help="Tokens that are predicted over them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def formats(
    model: str, names: tuple[str, ...], files: tuple[Path, ...], history: int, fed: int, as_json: bool
) -> None:
    """What each KV format costs: divergence from the predictions of a run without packing."""
    from agentmem.bench.formats import FORMATS, own_texts, run
    from agentmem.model.loaded import load

    texts = {f.name: f.read_text(encoding="utf-8") for f in files} or own_texts()
    home = Home(default_home())
    loaded = load(model, home.root)
    try:
        result = run(
            loaded, names or FORMATS, texts, history=history, fed=fed, calibrations=home.calibration, say=_say
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(json.dumps(result) if as_json else _format_table(result))


def _format_table(result: dict[str, Any]) -> str:
    lines = ["format       bits  mean KL      p95    top-1"]
    lines += [
        f"{r['format']:11s} {r['bits']:5.2f}  {r['kl']:7.4f}  {r['kl_p95']:7.4f}  {r['top1']:7.3f}"
        for r in result["rows"]
    ]
    return "\n".join([*lines, _checks(result)])


if __name__ == "__main__":
    bench(prog_name="agentmem bench")
