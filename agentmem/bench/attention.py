"""`bench attention`: one decode step's attention over packed rows against fused SDPA over 16-bit keys and values.

Calls are chained, the output of one being the query of the next, and evaluated as one graph. Each call reads other arrays,
together more than a cache holds, as the layers of a model do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.bench.checks import check
from agentmem.quant.attention import dequantised_history
from agentmem.quant.device import backend
from agentmem.quant.format import LayerShape, kv_format
from agentmem.quant.kernels import decode
from agentmem.quant.kernels.plan import Batch, Reach
from agentmem.quant.rows import RowCodec

PAGE = 64
CALLS = 24
SPREAD_BYTES = 256 << 20
"""Packed bytes that one graph reads before it reads the same again; an H200's cache holds 50 MB."""

Attend = Callable[[mx.array, int], mx.array]


class Stored:
    """Random rows of `batch` sequences of `tokens` tokens each, in `layers` arenas: raw first page, packed pages, raw tail."""

    def __init__(self, codec: RowCodec, query_heads: int, batch: int, tokens: int, layers: int) -> None:
        self.codec, self.scale = codec, codec.shape.key_dim**-0.5
        self.dtype = mx.float32 if backend() == "cpu" else codec.stored
        words = codec.packed_words
        per = PAGE * words // codec.raw_words
        raw_runs = -(-PAGE // per)
        packed = (tokens - PAGE - 1) // PAGE
        slots = batch * (raw_runs + packed)
        rng = np.random.default_rng(0)
        rows = self._random_rows(rng, min(slots * PAGE, 1 << 16))
        pages = mx.array(rng.integers(0, rows.shape[0] // PAGE, slots))
        self.arenas, self.tails = [], []
        for _ in range(layers):
            arena = rows.reshape(-1, PAGE * words)[pages].reshape(-1, words)
            self.arenas.append(arena)
            self.tails.append(self._raw(rng, batch * PAGE).reshape(batch, PAGE, -1))
            pages = mx.roll(pages, 1)
        reaches = []
        order = rng.permutation(slots)
        raw_rows = [min(per, PAGE - i * per) for i in range(raw_runs)]
        for i in range(batch):
            mine = order[i * (raw_runs + packed) : (i + 1) * (raw_runs + packed)]
            kinds = np.arange(len(mine)) < raw_runs
            reaches.append(Reach(mine, np.array(raw_rows + [PAGE] * packed), kinds, i))
        self.reaches = reaches
        self.tail_rows = tokens - PAGE - packed * PAGE
        self._fill_raw(rng, raw_rows)
        self.batch = Batch(reaches, PAGE, codec.shape.heads, query_heads // codec.shape.heads)
        self.batch.advance([self.tail_rows] * batch)
        shape = (batch, query_heads, 1, codec.shape.key_dim)
        self.queries = mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(self.dtype)
        fresh = [codec.unraw(t[:, self.tail_rows - 1], self.dtype) for t in self.tails[:1]]
        self.fresh = [x.swapaxes(0, 1)[:, :, None] for x in fresh[0]]
        mx.eval(self.arenas, self.tails, self.queries, self.fresh)

    def _raw(self, rng: np.random.Generator, rows: int) -> mx.array:
        shape = self.codec.shape
        keys, values = (
            mx.array(rng.standard_normal((shape.heads, rows, dim), dtype=np.float32))
            for dim in (shape.key_dim, shape.value_dim)
        )
        return self.codec.raw(keys, values)

    def _random_rows(self, rng: np.random.Generator, rows: int) -> mx.array:
        parts = [
            self.codec.pack(self._raw(rng, min(4096, rows - at)))[:, : self.codec.packed_words]
            for at in range(0, rows, 4096)
        ]
        return mx.concatenate(parts)

    def _fill_raw(self, rng: np.random.Generator, raw_rows: list[int]) -> None:
        """Raw rows into the slots of the first pages."""
        words, raw_words = self.codec.packed_words, self.codec.raw_words
        slots = np.concatenate([r.slots[: len(raw_rows)] for r in self.reaches])
        room = PAGE * words
        for number, arena in enumerate(self.arenas):
            images = [
                mx.pad(self._raw(rng, n).reshape(-1), (0, room - n * raw_words))
                for n in raw_rows * len(self.reaches)
            ]
            flat = arena.reshape(-1, room)
            flat[mx.array(slots)] = mx.stack(images)
            self.arenas[number] = flat.reshape(-1, words)

    @property
    def bytes(self) -> int:
        """That one call must read."""
        packed, raw = 4 * self.codec.packed_words, 4 * self.codec.raw_words
        runs = sum(int(np.where(r.raw, raw, packed) @ r.rows) for r in self.reaches)
        return runs + len(self.reaches) * self.tail_rows * raw

    def dequantised(self, layer: int, sequence: int) -> tuple[mx.array, mx.array]:
        """Keys and values [heads, tokens, dim] of one sequence."""
        reach, words = self.reaches[sequence], self.codec.packed_words
        pages = self.arenas[layer].reshape(-1, PAGE * words)
        raw = [
            pages[int(s), : n * self.codec.raw_words].reshape(n, -1)
            for s, n, kind in zip(reach.slots, reach.rows.tolist(), reach.raw, strict=True)
            if kind
        ]
        packed = pages[mx.array(reach.slots[~reach.raw])].reshape(-1, words) if (~reach.raw).any() else None
        tail = self.tails[layer][sequence, : self.tail_rows]
        keys, values = dequantised_history(self.codec, [*raw, tail], packed, self.dtype)
        return mx.concatenate(keys, axis=1), mx.concatenate(values, axis=1)

    def fused(self, queries: mx.array, layer: int) -> mx.array:
        return decode.flash_decode(
            self.codec, queries, self.fresh[0], self.fresh[1], self.arenas[layer], (self.tails[layer], 0), self.batch,
            scale=self.scale,
        )[0]  # fmt: skip

    def reference(self, queries: mx.array, layer: int) -> mx.array:
        """Dequantise, then fused SDPA, one sequence after the other."""
        outs = []
        for i in range(queries.shape[0]):
            keys, values = self.dequantised(layer, i)
            outs.append(
                mx.fast.scaled_dot_product_attention(
                    queries[i : i + 1], keys[None], values[None], scale=self.scale
                )
            )
        return mx.concatenate(outs)


def seconds(attend: Attend, queries: mx.array, layers: int, repeats: int) -> tuple[float, float]:
    """Median seconds of one call within a graph of CALLS: (to run it, to build it on the host)."""
    build, run = [], []
    for _ in range(repeats + 1):
        x = queries
        start = time.perf_counter()
        for i in range(CALLS):
            x = attend(x, i % layers)
        built = time.perf_counter()
        mx.eval(x)
        build.append((built - start) / CALLS)
        run.append((time.perf_counter() - built) / CALLS)
    return statistics.median(run[1:]), statistics.median(build[1:])


def measure(codec: RowCodec, query_heads: int, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """One shape: microseconds of a call, bytes that it must read, and how far the fused result is off."""
    row_bytes = 4 * codec.packed_words * batch * tokens
    layers = max(1, min(CALLS, -(-SPREAD_BYTES // row_bytes)))
    stored = Stored(codec, query_heads, batch, tokens, layers)
    shape = codec.shape
    wide = [
        tuple(
            mx.random.normal((batch, shape.heads, tokens, dim)).astype(stored.dtype)
            for dim in (shape.key_dim, shape.value_dim)
        )
        for _ in range(max(1, layers // 4))
    ]
    mx.eval(wide)

    def sixteen_bits(queries: mx.array, layer: int) -> mx.array:
        keys, values = wide[layer % len(wide)]
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=stored.scale)

    row: dict[str, Any] = {"batch": batch, "tokens": tokens, "bytes": stored.bytes}
    row["sdpa_us"], row["sdpa_host_us"] = _micro(seconds(sixteen_bits, stored.queries, layers, repeats))
    wide.clear()
    if tokens * batch <= 1 << 17:
        row["dequantise_us"], _ = _micro(seconds(stored.reference, stored.queries, layers, 1))
    if decode.supported(codec, query_heads):
        row["fused_us"], row["fused_host_us"] = _micro(seconds(stored.fused, stored.queries, layers, repeats))
        row["fused_over_sdpa"] = row["fused_us"] / row["sdpa_us"]
        row["fused_gb_s"] = stored.bytes / row["fused_us"] / 1e3
        off = mx.abs(stored.fused(stored.queries, 0)[0] - stored.reference(stored.queries[:1], 0)[0])
        row["error"] = off.astype(mx.float32).max().item()
    return row


def _micro(times: tuple[float, float]) -> tuple[float, float]:
    return 1e6 * times[0], 1e6 * times[1]


def run(
    *, heads: int, query_heads: int, dim: int, format: str, batches: list[int], lengths: list[int], repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Every batch with every length, and the checks."""
    shape = LayerShape(heads, dim, dim)
    codec = RowCodec(shape, kv_format(format).for_shape(shape), mx.float16)
    rows = []
    for batch in batches:
        for tokens in lengths:
            rows.append(measure(codec, query_heads, batch, tokens, repeats))
            say(", ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()))
            mx.clear_cache()
    shape_name = {"heads": heads, "query_heads": query_heads, "dim": dim, "format": format}
    return {
        "schema_version": 1,
        "backend": backend(),
        "shape": shape_name,
        "rows": rows,
        "checks": checks(rows),
    }


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is promised where the fused path runs."""
    found = []
    for batch, bound in ((1, 1.0), (8, 0.8)):
        for row in rows:
            if (row["batch"], row["tokens"]) == (batch, 32768) and "fused_us" in row:
                name = f"fused attention / SDPA on 16 bits, batch {batch}, 32768 tokens"
                found.append(check(name, row["fused_over_sdpa"], bound, "ratio", True))
    for row in rows:
        if "error" in row:
            found.append(
                check(
                    f"fused attention, off at batch {row['batch']}, {row['tokens']} tokens",
                    row["error"],
                    2e-3,
                    "",
                    True,
                )
            )
    return found
