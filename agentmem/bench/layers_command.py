"""`verify`, `layouts` and `bytes`: what formats cost a model, what works with which layers, and what agents take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from agentmem.bench.command import MODEL, Result, benchmark, checks, model_of, say, tokens
from agentmem.home import Home, default_home

FORMATS = "q4,q3,q4-stock"


def _verdict_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']} on {result['backend']}: {len(result['texts'])} texts, {result['cases']} cases",
        "format        bits  mean KL (95 %)               p95  first   top-1  perplexity  arguments  lost  verdict",
    ]
    for r in result["rows"]:
        low, high = r["kl_interval"]
        kl = f"{r['kl']:.4f} ({low:.4f} to {high:.4f})  {r['kl_p95']:7.4f} {r['kl_first']:6.4f}  {r['top1']:.3f}"
        said = f"{r['perplexity_change']:+8.2f} %  {100 * (r['argument_accuracy'] or 0):7.1f} %  {len(r['lost']):4d}"
        lines.append(f"{r['format']:12s} {r['bits']:5.2f}  {kl}  {said}  {r['verdict']}")
    lost = [f"{r['format']} loses {name}" for r in result["rows"] for name in r["lost"]]
    return "\n".join([*lines, *lost, f"recommended: {result['recommended']}", checks(result)])


@benchmark(
    _verdict_table,
    MODEL,
    click.option("--formats", "names", default=FORMATS, help="KV formats, such as q4,k8v4."),
    click.option(
        "--data",
        "files",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A text to measure on instead of ours; repeatable.",
    ),
    click.option("--quick", is_flag=True, help="Three texts and few cases: a first look, no promise."),
)
def verify(model: str, names: str, files: tuple[Path, ...], quick: bool) -> Result:
    """What KV formats cost a model's answers; keeps the verdict with the model."""
    from agentmem.bench.verdict import measure, verdict
    from agentmem.model.verdict_file import VerdictFile

    own = {f.name: f.read_text(encoding="utf-8") for f in files} or None
    loaded, folder = model_of(model), Home(default_home()).calibration
    try:
        result = measure(loaded, names.split(","), own=own, quick=quick, calibrations=folder, say=say)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    for row in result["rows"]:
        row["verdict"] = verdict(row)
    VerdictFile(folder, loaded.identity).write({row["format"]: row for row in result["rows"]})
    return result


def _layouts_table(result: dict[str, Any]) -> str:
    from agentmem.bench.layouts import table

    return "\n".join([table(result), "", checks(result)])


@benchmark(
    _layouts_table,
    click.option(
        "--type", "names", multiple=True, help="A model type; repeatable. Default: all of mlx-lm's."
    ),
)
def layouts(names: tuple[str, ...]) -> Result:
    """What works with the layers of each model type, tried on tiny random models."""
    from agentmem.bench.layouts import measure
    from agentmem.model.zoo import ZOO

    unknown = [name for name in names if name not in ZOO]
    if unknown:
        raise click.UsageError(f"there is no tiny model of the type {', '.join(unknown)}")
    return measure(names or None, say=say)


def _bytes_table(result: dict[str, Any]) -> str:
    from agentmem.bench.footprint import table

    return "\n".join([table(result), "", checks(result)])


@benchmark(
    _bytes_table,
    click.option("--shape", "names", multiple=True, help="A model shape; repeatable. Default: all."),
    tokens("1024,2048,4096,8192,16384,32768", "Lengths of the context."),
    click.option(
        "--written", default="8192", help="Lengths at which an agent is written to files, such as 8192,32768."
    ),
    click.option("--format", "format", default="q4", help="KV format."),
)
def bytes(names: tuple[str, ...], lengths: list[int], written: str, format: str) -> Result:
    """What an agent takes in RAM and on disk, by model shape, next to plain 4 bits of every token and to stock mlx-lm."""
    from agentmem.bench.footprint import SHAPES, measure

    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise click.UsageError(f"there is no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    try:
        sizes = [int(size) for size in written.split(",") if size]
    except ValueError:
        raise click.UsageError("give lengths like 8192,32768") from None
    return measure(names or list(SHAPES), lengths, written=sizes, format=format, say=say)
