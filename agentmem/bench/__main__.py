"""`python -m agentmem.bench restore|store|formats|attention|batch|compose|episodic|http|layouts|bytes|verify ...`: what
`agentmem bench` and `agentmem verify MODEL` run.

JSON on stdout, progress on stderr.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import agentmem.bench.episodic_command
import agentmem.bench.layers_command  # noqa: F401  (they declare themselves)
from agentmem.bench.command import (
    BITS,
    MEGABYTES,
    MODEL,
    SHAPE,
    Result,
    batches,
    bench,
    benchmark,
    checks,
    model_of,
    say,
    tokens,
)
from agentmem.home import Home, default_home
from agentmem.settings import Settings


def _restore_table(result: dict[str, Any]) -> str:
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
    return "\n".join([*lines, checks(result)])


@benchmark(
    _restore_table,
    MODEL,
    SHAPE,
    BITS,
    tokens("1024", "Context lengths, such as 1024,4096."),
    click.option("--chunk", default=512, help="Prefill chunk in tokens."),
    click.option("--repeats", default=3, help="Hot and warm turns per length; medians are reported."),
    MEGABYTES,
    click.option(
        "--drop-cache", is_flag=True, help="Drop the page cache of the extents before every warm turn."
    ),
)
def restore(model: str, shape: str | None, bits: str, **options: Any) -> Result:
    """Time to first token cold, hot and warm, restore bandwidth, and the same through stock mlx-lm."""
    from agentmem.bench.restore import run

    return run(model_of(model, shape, bits), **options, say=say)


def _http_table(result: dict[str, Any]) -> str:
    head = f"{result['model']}: {len(result['rows'])} hot turns, TTFT in the engine {result['engine_ms']:.1f} ms, "
    return f"{head}HTTP adds {result['http_ms']:.1f} ms (p95 {result['http_p95_ms']:.1f})\n{checks(result)}"


@benchmark(
    _http_table,
    MODEL,
    click.option("--turns", default=20, help="Hot turns of which medians are reported."),
    click.option("--words", default=500, help="Words of the first message."),
)
def http(**options: Any) -> Result:
    """What HTTP adds to the time to first token."""
    from agentmem.bench.wire import run

    return run(**options, say=say)


@benchmark(
    checks,
    click.option("--pages", default=100_000, help="Pages of the large home."),
    click.option("--agents", default=1000, help="Agents of the large home."),
    click.option("--turns", default=200, help="Turns of the long session."),
    click.option("--steps", default=2000, help="Decode steps of a round alone, and as many under commits."),
    MEGABYTES,
    click.option("--repeats", default=5, help="Rounds of which medians are reported."),
)
def store(**options: Any) -> Result:
    """Put and restore bandwidth, long sessions, delays of decoding, lookup, fork, and opening after a crash."""
    from agentmem.bench.store import run

    return run(**options, say=say)


@benchmark(
    checks,
    click.option("--heads", default=8, help="KV heads."),
    click.option("--query-heads", default=32, help="Query heads."),
    click.option("--dim", default=128, help="Head size."),
    click.option(
        "--format", "formats", multiple=True, default=("q4", "q4-plain"), help="A KV format; repeatable."
    ),
    batches("1,8", "Sequences at once, such as 1,8,16."),
    tokens("4096,32768", "Context lengths, such as 4096,32768.", least=65),
    click.option("--repeats", default=5, help="Graphs of which the median is reported."),
)
def attention(**options: Any) -> Result:
    """One decode step's attention: fused over packed rows, against SDPA over 16-bit keys and values."""
    from agentmem.bench.attention import run

    return run(**options, say=say)


def _format_table(result: dict[str, Any]) -> str:
    lines = ["format                       bits  mean KL      p95    top-1"]
    lines += [
        f"{r['format']:27s} {r['bits']:5.2f}  {r['kl']:7.4f}  {r['kl_p95']:7.4f}  {r['top1']:7.3f}"
        for r in result["rows"]
    ]
    return "\n".join([*lines, checks(result)])


@benchmark(
    _format_table,
    MODEL,
    click.option("--format", "names", multiple=True, help="A format to measure; repeatable. Default: all."),
    click.option(
        "--text",
        "files",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A text to measure on; repeatable. Default: thirteen that no calibration saw.",
    ),
    click.option("--history", default=640, help="Tokens of a text that are held in the format."),
    click.option("--next", "fed", default=128, help="Tokens that are predicted over them."),
)
def formats(model: str, names: tuple[str, ...], files: tuple[Path, ...], **options: Any) -> Result:
    """What each KV format costs: divergence from the predictions of a run without packing."""
    from agentmem.bench.cases import texts as own_texts
    from agentmem.bench.formats import FORMATS, run

    texts = {f.name: f.read_text(encoding="utf-8") for f in files} or own_texts()
    loaded, folder = model_of(model), Home(default_home()).calibration
    try:
        return run(loaded, names or FORMATS, texts, **options, calibrations=folder, say=say)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


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
    return "\n".join([*lines, checks(result)])


@benchmark(
    _batch_table,
    MODEL,
    SHAPE,
    BITS,
    batches("1,2,4,8,16", "Streams at once, such as 1,8,16."),
    tokens("1024,4096", "Context lengths, such as 4096,32768; a context beyond the model's own is skipped."),
    click.option("--steps", default=64, type=click.IntRange(1), help="Tokens of each stream in a round."),
    click.option("--rounds", default=3, type=click.IntRange(1), help="Rounds of which medians are reported."),
    click.option(
        "--format", default=Settings.model_fields["kv_format"].default, help="KV format.", show_default=True
    ),
    click.option("--load/--no-load", default=True, help="Measure a runtime under load too; on by default."),
    click.option("--streams", type=click.IntRange(1, 64), help="Streams of the load; default 8, on a CPU 3."),
    click.option(
        "--prompt",
        type=click.IntRange(512),
        help="Tokens of the prompt that arrives; default 16384, on a CPU 2048.",
    ),
    click.option(
        "--chunk", type=click.IntRange(16), help="Prefill chunk in tokens; default 2048, on a CPU 512."
    ),
)
def batch(
    model: str,
    shape: str | None,
    bits: str,
    load: bool,
    streams: int | None,
    prompt: int | None,
    chunk: int | None,
    **options: Any,
) -> Result:
    """Many streams at once: decode speed and memory next to 16-bit pages and stock mlx-lm, and speed under load."""
    from agentmem.bench.batch import run
    from agentmem.bench.loaded import default_load

    given = {"streams": streams, "prompt": prompt, "chunk": chunk}
    under = replace(default_load(), **{k: v for k, v in given.items() if v}) if load else None
    loaded, folder = model_of(model, shape, bits), None if shape else Home(default_home()).calibration
    try:
        return run(loaded, **options, folder=folder, load=under, say=say)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _compose_table(result: Result) -> str:
    lines = []
    for done in result["rounds"]:
        lines.append(
            f"{done['round']} of {len(done['agents'])} agents, {done['families']} families of questions"
        )
        lines.append(
            "planner       requests   read  TTFT ms  faster  last's  mean KL      p95    first   top-1  answers"
        )
        lines += [
            f"{r['planner']:13s} {r['requests']:8d}  {r['read']:5.3f} {r['ttft_ms']:8.0f} {r['dense_over_this']:6.1f}x "
            f"{r['last_dense_over_this']:6.1f}x {r['kl']:8.4f} {r['kl_p95']:8.4f} {r['kl_first']:8.4f} "
            f"{r['top1']:7.3f} {r['same_answers']:8.3f}"
            for r in done["rows"]
        ]
    return "\n".join([*lines, checks(result)])


def _times_table(result: Result) -> str:
    lines = ["planner        last's TTFT ms  faster  all from the second ms  faster"]
    lines += [
        f"{r['planner']:13s} {r['last_ttft_ms']:15.0f} {r['last_dense_over_this']:6.1f}x {r['rest_ms']:23.0f} "
        f"{r['rest_dense_over_this']:6.1f}x"
        for r in result["rows"]
    ]
    return "\n".join([*lines, checks(result)])


@benchmark(
    lambda result: _times_table(result) if "rows" in result else _compose_table(result),
    MODEL,
    SHAPE,
    BITS,
    click.option(
        "--planner",
        "names",
        multiple=True,
        help="A planner to measure beside dense; repeatable. Default: all.",
    ),
    click.option(
        "--round",
        "rounds",
        multiple=True,
        type=click.Choice(["chain", "round"]),
        help="Three agents over three families of questions, or five over one; repeatable. Default: both.",
    ),
    click.option("--anchors", default=16, type=click.IntRange(1), help="Questions of a family for anchors."),
    click.option(
        "--tests", default=7, type=click.IntRange(1), help="Questions of a family that are measured."
    ),
    click.option("--answer", default=32, type=click.IntRange(2), help="Tokens of an agent's answer at most."),
    click.option(
        "--format", default=Settings.model_fields["kv_format"].default, help="KV format.", show_default=True
    ),
    click.option("--megabytes", default=2048, help="Budget of a family's anchors, and again of the paper's."),
    click.option(
        "--times-only",
        is_flag=True,
        help="Only times to the first token, of five agents over random tokens: see --question and --answer.",
    ),
    click.option("--question", default=1024, type=click.IntRange(16), help="Tokens of the question then."),
    click.option(
        "--questions",
        type=click.Choice(["chain", "unseen", "pages"]),
        default="chain",
        help="Those by which weights were chosen, others as long, or pages of a manual with a question each.",
    ),
)
def compose(
    model: str,
    shape: str | None,
    bits: str,
    names: tuple[str, ...],
    rounds: tuple[str, ...],
    times_only: bool,
    question: int,
    **options: Any,
) -> Result:
    """Segments of several agents' prompts put together in several ways, against prompts that were read whole."""
    from agentmem.bench import compose_times
    from agentmem.bench.compose import PLANNERS, ROUNDS, run

    known = compose_times.PLANNERS if times_only else PLANNERS
    if unknown := set(names) - set(known):
        raise click.BadParameter(f"there is no planner {min(unknown)!r}; there are {', '.join(known)}")
    if shape and not times_only:
        raise click.UsageError("random weights say nothing: give --times-only with --shape")
    loaded = model_of(model, shape, bits)
    chosen = tuple(dict.fromkeys(("dense", *names))) if names else known
    if times_only:
        return compose_times.run(
            loaded, chosen, question=question, answer=options["answer"], anchors=options["anchors"], say=say
        )
    try:
        return run(
            loaded,
            chosen,
            rounds or tuple(ROUNDS),
            **options,
            calibrations=Home(default_home()).calibration,
            say=say,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


if __name__ == "__main__":
    bench(prog_name="agentmem bench")
