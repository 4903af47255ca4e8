"""`python -m agentmem.bench restore|store|formats|attention|batch ...`: what `agentmem bench` runs.

JSON on stdout, progress on stderr.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from agentmem.home import Home, default_home
from agentmem.settings import Settings


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


@bench.command()
@click.option(
    "--model", default="embedded", help="Model to run: embedded, an MLX folder, a GGUF file or org/name."
)
@click.option(
    "--shape", help="Random 4-bit weights of a named architecture instead of a model, such as llama-3.1-8b."
)
@click.option(
    "--batch", "batches", default="1,2,4,8,16", callback=_counts, help="Streams at once, such as 1,8,16."
)
@click.option(
    "--tokens",
    "lengths",
    default="1024,4096",
    callback=_lengths,
    help="Context lengths, such as 4096,32768; a context beyond the model's own is skipped.",
)
@click.option("--steps", default=64, type=click.IntRange(1), help="Tokens of each stream in a round.")
@click.option("--rounds", default=3, type=click.IntRange(1), help="Rounds of which medians are reported.")
@click.option(
    "--format", default=Settings.model_fields["kv_format"].default, help="KV format.", show_default=True
)
@click.option("--load/--no-load", default=True, help="Measure a runtime under load too; on by default.")
@click.option("--streams", type=click.IntRange(1, 64), help="Streams of the load; default 8, on a CPU 3.")
@click.option(
    "--prompt",
    type=click.IntRange(512),
    help="Tokens of the prompt that arrives; default 16384, on a CPU 2048.",
)
@click.option("--chunk", type=click.IntRange(16), help="Prefill chunk in tokens; default 2048, on a CPU 512.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def batch(
    model: str,
    shape: str | None,
    load: bool,
    streams: int | None,
    prompt: int | None,
    chunk: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Many streams at once: decode speed and memory next to 16-bit pages and stock mlx-lm, and speed under load."""
    from agentmem.bench.batch import run
    from agentmem.bench.loaded import default_load
    from agentmem.model.loaded import load as load_model
    from agentmem.model.random import shape_model

    home = Home(default_home())
    given = {"streams": streams, "prompt": prompt, "chunk": chunk}
    under = (
        replace(default_load(), **{name: value for name, value in given.items() if value}) if load else None
    )
    loaded = shape_model(shape) if shape else load_model(model, home.root)
    try:
        result = run(loaded, **options, folder=None if shape else home.calibration, load=under, say=_say)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(json.dumps(result) if as_json else _batch_table(result))


def _batch_table(result: dict[str, Any]) -> str:
    names = {"pages": result["format"], "fp16_pages": "fp16", "stock": "stock", "stock_single": "stock, one"}
    lines = [
        f"{result['model']} on {result['backend']}, {result['dtype']}; tokens/s of all streams (peak MB)",
        "batch  tokens  " + "".join(f"{title:>18s}" for title in names.values()),
    ]
    for row in result["rows"]:
        cells = "".join(
            f"{row[n]['tokens_per_s']:9.1f} ({row[n]['peak_bytes'] / 1e6:6.0f})" if n in row else " " * 18
            for n in names
        )
        lines.append(f"{row['batch']:5d} {row['tokens']:7d}  {cells}")
    under = result["load"]
    if under is not None:
        beside, alone = under["beside_prompt"], under["alone"]
        lines += [
            f"{under['streams']} streams, ms between tokens p50/p99: {alone['p50_ms']:.1f}/{alone['p99_ms']:.1f}; while "
            f"{under['prompt_tokens']} tokens are read {beside['p50_ms']:.1f}/{beside['p99_ms']:.1f}",
            f"a warm agent's first token: {under['warm_idle_ttft_ms']:.0f} ms idle, "
            f"{under['warm_loaded_ttft_ms']:.0f} beside them",
        ]
    return "\n".join([*lines, _checks(result)])


if __name__ == "__main__":
    bench(prog_name="agentmem bench")
