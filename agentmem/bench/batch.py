"""`bench batch`: many streams at once. Decode speed and memory against 16-bit pages and stock mlx-lm, and speed under load.

Histories are random rows, no prompt is run for them: how long a decode step takes does not depend on their values. The
contenders of one row take turns within one run, because machines drift; medians are reported.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from agentmem.bench import loaded
from agentmem.bench.checks import check
from agentmem.bench.decoders import Batched, Decoder, Format, Paged, Single
from agentmem.engine.admission import device_bytes
from agentmem.model.loaded import LoadedModel
from agentmem.quant.device import backend

Say = Callable[[str], None]

WARM_STEPS = 4
AHEAD = 2
"""Steps that stock mlx-lm computes before it is asked for them."""
USABLE = 0.85
"""Share of the device's memory that the contenders of a row may take together."""

SHAPE = "llama-3.1-8b"


@dataclass(slots=True)
class _Contender:
    """A decoder, what it holds, and the steps that were timed."""

    decoder: Decoder
    held: int
    step_s: list[float] = field(default_factory=list)
    peak: int = 0

    def round(self, steps: int, others: int) -> None:
        """Time `steps` steps. `others`: bytes that are not this contender's."""
        mx.reset_peak_memory()
        start = time.perf_counter()
        for _ in range(steps):
            self.decoder.step()
        self.decoder.wait()
        self.step_s.append((time.perf_counter() - start) / steps)
        self.peak = max(self.peak, mx.get_peak_memory() - others)

    def report(self, batch: int) -> dict[str, float]:
        seconds = statistics.median(self.step_s)
        return {
            "step_ms": 1e3 * seconds,
            "best_step_ms": 1e3 * min(self.step_s),
            "tokens_per_s": batch / seconds,
            "stream_tokens_per_s": 1 / seconds,
            "spread": max(self.step_s) / min(self.step_s),
            "peak_bytes": self.peak,
        }


class DecodeBench:
    """Rows of batch and context. `steps` tokens a round; 64 of them hold the packing of one page of each stream."""

    def __init__(self, model: LoadedModel, format: str, steps: int, rounds: int, folder: Path | None) -> None:
        self._steps, self._rounds = steps, rounds
        self._total = WARM_STEPS + steps * rounds + AHEAD
        self.ours, self.sixteen = Format(model, format, folder), Format(model, "fp16", folder)
        named: list[Any] = list(tree_flatten(model.model.parameters()))
        mx.eval([value for _, value in named])
        self.weights = sum(value.nbytes for _, value in named)

    def makers(self, batch: int, tokens: int) -> dict[str, Callable[[], Decoder]]:
        """The contenders of a row, by the names that the report has for them."""
        makers: dict[str, Callable[[], Decoder]] = {
            "pages": lambda: Paged(self.ours, batch, tokens, self._total),
            "fp16_pages": lambda: Paged(self.sixteen, batch, tokens, self._total),
            "stock": lambda: Batched(self.ours, batch, tokens, self._total),
        }
        if batch == 1:
            makers["stock_single"] = lambda: Single(self.ours, tokens, self._total)
        return makers

    def need(self, batch: int, tokens: int) -> int:
        """Bytes that the contenders of a row take together, about."""
        g = self.ours.geometry
        stock = g.raw_row_bytes * self.ours.dtype.size // 2 * (2 if batch == 1 else 1)
        rows = batch * (tokens + self._total + 256)
        return self.weights + rows * (g.packed_row_bytes + g.raw_row_bytes + stock)

    def measure(self, batch: int, tokens: int) -> dict[str, Any]:
        """One row: every contender's speed and peak of memory, weights included."""
        base = mx.get_active_memory()
        contenders = {name: _warmed(make) for name, make in self.makers(batch, tokens).items()}
        names = list(contenders)
        for turn in range(self._rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                one = contenders[name]
                before = mx.get_active_memory()
                one.round(self._steps, before - one.held - self.weights)
                one.held += mx.get_active_memory() - before
        row: dict[str, Any] = {"batch": batch, "tokens": tokens}
        for name, one in contenders.items():
            row[name] = one.report(batch)
            one.decoder.close()
        del one
        contenders.clear()
        gc.collect()  # pools and generators hold themselves in cycles
        mx.clear_cache()
        row["left_bytes"] = mx.get_active_memory() - base
        return row


def _warmed(make: Callable[[], Decoder]) -> _Contender:
    """A contender that has run a few steps, so that everything is compiled."""
    before = mx.get_active_memory()
    decoder = make()
    for _ in range(WARM_STEPS):
        decoder.step()
    decoder.wait()
    return _Contender(decoder, mx.get_active_memory() - before)


def run(
    model: LoadedModel, *, batches: list[int], lengths: list[int], steps: int, rounds: int, format: str,
    folder: Path | None, load: loaded.Load | None, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Every batch with every context that fits, then the figures under `load`, then the checks."""
    bench = DecodeBench(model, format, steps, rounds, folder)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, int]] = []
    for tokens in lengths:
        for batch in batches:
            need = bench.need(batch, tokens)
            if need > USABLE * device_bytes() or tokens + bench._total > model.max_context:
                skipped.append({"batch": batch, "tokens": tokens, "bytes": need})
                say(f"skipped: {json.dumps(skipped[-1])}")
                continue
            rows.append(bench.measure(batch, tokens))
            say(json.dumps(rows[-1]))
    under = loaded.measure(model, load, format, say) if load is not None else None
    if under is not None:
        say(json.dumps(under))
    return {
        "schema_version": 1,
        "model": model.name,
        "backend": backend(),
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "format": format,
        "fused": {format: bench.ours.fused, "fp16": bench.sixteen.fused},
        "row_bytes": {"pages": bench.ours.geometry.packed_row_bytes, "fp16": bench.ours.geometry.raw_row_bytes},
        "steps": steps,
        "rows": rows,
        "skipped": skipped,
        "load": under,
        "checks": checks(model.name, rows, under),
    }  # fmt: skip


def checks(name: str, rows: list[dict[str, Any]], under: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The figures that are promised for this backend, of those that were measured."""
    speed = {(r["batch"], r["tokens"]): r for r in rows}
    if backend() == "cpu":
        return _cpu(speed)
    out = _against_sixteen_bits(speed) if backend() == "cuda" and name.startswith(SHAPE) else []
    return out + (loaded.checks(under) if under is not None and backend() == "cuda" else [])


def _system(row: dict[str, Any], contender: str = "pages") -> float:
    return float(row[contender]["tokens_per_s"])


def _cpu(speed: dict[tuple[int, int], dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    shortest = min((tokens for _, tokens in speed), default=0)
    if {(1, shortest), (4, shortest)} <= speed.keys():
        ratio = _system(speed[4, shortest]) / _system(speed[1, shortest])
        out.append(check(f"tokens/s of 4 streams / of 1 at {shortest}", ratio, 1.7, "ratio", False))
    if (1, 4096) in speed:
        row = speed[1, 4096]
        best = max(_system(row, "stock"), _system(row, "stock_single"))
        out.append(
            check(
                "decode over pages / over stock's float32 cache at 4096",
                _system(row) / best,
                0.6,
                "ratio",
                False,
            )
        )
    return out  # fmt: skip


PEERS = {
    "fp16_pages": "16-bit pages",
    "stock": "stock's 16-bit cache",
    "stock_single": "stock's 16-bit cache, one stream by itself",
}


def _against_sixteen_bits(speed: dict[tuple[int, int], dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for batch, tokens, bound in ((1, 4096, 1.0), (1, 32768, 1.0), (8, 32768, 1.1)):
        row = speed.get((batch, tokens), {})
        for peer in (p for p in PEERS if p in row):
            name = f"decode over pages / over {PEERS[peer]}, {batch} at {tokens}"
            out.append(check(name, _system(row) / _system(row, peer), bound, "ratio", False))
    if {(1, 4096), (8, 4096)} <= speed.keys():
        ratio = _system(speed[8, 4096]) / _system(speed[1, 4096])
        out.append(check("tokens/s of 8 streams / of 1 at 4096", ratio, 4.0, "ratio", False))
    return out
