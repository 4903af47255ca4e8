"""`bench attention`: one decode step's attention over packed rows against fused SDPA over 16-bit keys and values.

Calls are chained, the output of one being the query of the next, and evaluated as one graph. Each call reads other arrays,
together more than a cache holds, as the layers of a model do. A format that gives some layers more bits is timed as the mean
of its layers.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.bench.checks import check
from agentmem.quant.attention import dequantised_history
from agentmem.quant.calibration import spare_layers, wide_format
from agentmem.quant.device import backend
from agentmem.quant.format import KVFormat, LayerShape, kv_format
from agentmem.quant.kernels import decode
from agentmem.quant.kernels.plan import Batch, Reach
from agentmem.quant.keymap import CalibratedMap, KeyMap
from agentmem.quant.rows import RowCodec

DEFAULT, PLAIN = "q4", "q4-plain"
MOST_OF_PLAIN = 1.05
LAYERS = 32
"""Of the model whose layers share a format's spare bits."""
PAGE = 64
CALLS = 24
SPREAD_BYTES = 256 << 20
"""Packed bytes that one graph reads before it reads the same again; an H200's cache holds 50 MB."""

Attend = Callable[[mx.array, int], mx.array]


class Stored:
    """Random rows of `batch` sequences of `tokens` tokens each, in `layers` arenas: raw first page, packed pages, raw tail."""

    def __init__(self, codec: RowCodec, query_heads: int, batch: int, tokens: int) -> None:
        self.codec, self.scale = codec, codec.shape.key_dim**-0.5
        self.layers = layers_of(codec, batch, tokens)
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
        for _ in range(self.layers):
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
        self.map = self._map(rng)
        keys, values = (
            x.swapaxes(0, 1)[:, :, None]
            for x in codec.unraw(self.tails[0][:, self.tail_rows - 1], self.dtype)
        )
        self.fresh = (self.map.restored(keys).astype(self.dtype), values)
        mx.eval(self.arenas, self.tails, self.queries, self.fresh)

    def _map(self, rng: np.random.Generator) -> KeyMap:
        if not self.codec.format.calibrated:
            return KeyMap()
        shape = self.codec.shape.heads, self.codec.shape.key_dim
        scale = np.exp2(rng.integers(-2, 3, shape)).astype(np.float32)
        return CalibratedMap(rng.standard_normal(shape, dtype=np.float32), scale, self.dtype)

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
            scale=self.scale, vectors=self.map.vectors,
        )[0]  # fmt: skip

    def reference(self, queries: mx.array, layer: int) -> mx.array:
        """Dequantise, then fused SDPA, one sequence after the other."""
        outs, queries = [], self.map.queries(queries)
        for i in range(queries.shape[0]):
            keys, values = self.dequantised(layer, i)
            outs.append(
                mx.fast.scaled_dot_product_attention(
                    queries[i : i + 1], keys[None], values[None], scale=self.scale
                )
            )
        return mx.concatenate(outs)


def layers_of(codec: RowCodec, batch: int, tokens: int) -> int:
    """How many layers' rows one graph reads before it reads the same again."""
    return max(1, min(CALLS, -(-SPREAD_BYTES // (4 * codec.packed_words * batch * tokens))))


def shares(format: KVFormat, shape: LayerShape) -> dict[RowCodec, float]:
    """Which codecs the layers of a model of `LAYERS` such layers have, and the share of each."""
    codecs = [RowCodec(shape, format.for_shape(shape), mx.float16)] * LAYERS
    for i in spare_layers(codecs, [0.0] * LAYERS) if format.spare_bits else ():
        codecs[i] = replace(codecs[i], format=wide_format(codecs[i].format, format.spare_bits))
    return {codec: count / LAYERS for codec, count in Counter(codecs).items()}


def seconds(attend: Attend, queries: mx.array, layers: int) -> tuple[float, float]:
    """Seconds of one call within a graph of CALLS: (to run it, to build it on the host)."""
    x = queries
    start = time.perf_counter()
    for i in range(CALLS):
        x = attend(x, i % layers)
    built = time.perf_counter()
    mx.eval(x)
    return (time.perf_counter() - built) / CALLS, (built - start) / CALLS


def _median(times: list[tuple[float, float]]) -> tuple[float, float]:
    """In microseconds."""
    run, build = zip(*times, strict=True)
    return 1e6 * statistics.median(run), 1e6 * statistics.median(build)


def sixteen_bits(stored: Stored, batch: int, tokens: int, repeats: int) -> float:
    """Microseconds of fused SDPA over as many keys and values of 16 bits."""
    shape, layers = stored.codec.shape, max(1, stored.layers // 4)
    wide = [
        tuple(
            mx.random.normal((batch, shape.heads, tokens, dim)).astype(stored.dtype)
            for dim in (shape.key_dim, shape.value_dim)
        )
        for _ in range(layers)
    ]
    mx.eval(wide)

    def attend(queries: mx.array, layer: int) -> mx.array:
        keys, values = wide[layer]
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=stored.scale)

    return _median([seconds(attend, stored.queries, layers) for _ in range(repeats + 1)][1:])[0]


def measure(
    codecs: Sequence[RowCodec], query_heads: int, batch: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Of each codec, at one shape: microseconds of a call, bytes that it must read, and how far the fused result is off.

    Codecs take turns, so that they share what the machine does meanwhile.
    """
    states = [Stored(codec, query_heads, batch, tokens) for codec in codecs]
    sdpa_us = sixteen_bits(states[0], batch, tokens, repeats)
    rows: list[dict[str, Any]] = [{"bytes": s.bytes, "sdpa_us": sdpa_us} for s in states]
    for stored, row in zip(states, rows, strict=True):
        if tokens * batch <= 1 << 17:
            row["dequantise_us"] = _median(
                [seconds(stored.reference, stored.queries, stored.layers) for _ in "12"][1:]
            )[0]
    fused = [i for i, codec in enumerate(codecs) if decode.supported(codec, query_heads)]
    times: dict[int, list[tuple[float, float]]] = {i: [] for i in fused}
    for _ in range(repeats + 1):
        for i in fused:
            times[i].append(seconds(states[i].fused, states[i].queries, states[i].layers))
    for i in fused:
        stored, row = states[i], rows[i]
        row["fused_us"], row["fused_host_us"] = _median(times[i][1:])
        row["error"] = _error(stored)
    return rows


def _error(stored: Stored) -> float:
    """Of the fused result, relative to the largest of the reference's."""
    want = stored.reference(stored.queries[:1], 0)[0].astype(mx.float32)
    off = stored.fused(stored.queries, 0)[0].astype(mx.float32) - want
    return float(np.array(mx.abs(off).max() / mx.abs(want).max()))


def _mean(rows: dict[RowCodec, dict[str, Any]], share: dict[RowCodec, float]) -> dict[str, Any]:
    """The row of a format whose layers are packed by these codecs."""
    keys = set.intersection(*(set(rows[codec]) for codec in share))
    mean: dict[str, Any] = {
        key: sum(part * rows[codec][key] for codec, part in share.items()) for key in sorted(keys)
    }
    if "fused_us" in mean:
        mean |= {
            "fused_over_sdpa": mean["fused_us"] / mean["sdpa_us"],
            "fused_gb_s": mean["bytes"] / mean["fused_us"] / 1e3,
        }
        mean["error"] = max(rows[codec]["error"] for codec in share)
    return mean


def run(
    *, heads: int, query_heads: int, dim: int, formats: Sequence[str], batches: list[int], lengths: list[int],
    repeats: int, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Every batch with every length and format, and the checks."""
    shape = LayerShape(heads, dim, dim)
    mixes = {name: shares(kv_format(name), shape) for name in formats}
    codecs = list(dict.fromkeys(codec for share in mixes.values() for codec in share))
    rows: list[dict[str, Any]] = []
    for batch in batches:
        for tokens in lengths:
            found = dict(zip(codecs, measure(codecs, query_heads, batch, tokens, repeats), strict=True))
            for name, share in mixes.items():
                rows.append({"format": name, "batch": batch, "tokens": tokens} | _mean(found, share))
                say(", ".join(f"{k} {v:.4g}" if k != "format" else v for k, v in rows[-1].items()))
            mx.clear_cache()
    return {
        "schema_version": 1,
        "backend": backend(),
        "shape": {"heads": heads, "query_heads": query_heads, "dim": dim},
        "layers": {
            name: {_bits(codec): part for codec, part in share.items()} for name, share in mixes.items()
        },
        "rows": rows,
        "checks": checks(rows),
    }


def _bits(codec: RowCodec) -> str:
    """Of a key and a value."""
    keys, values = codec.format.keys, codec.format.values
    return f"{keys.bits if keys else 16}/{values.bits if values else 16}"


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is promised where the fused path runs."""
    found = []
    fused = {(r["format"], r["batch"], r["tokens"]): r for r in rows if "fused_us" in r}
    for (name, batch, tokens), row in fused.items():
        bound = {1: 1.0, 8: 0.8}.get(batch)
        if name == PLAIN and tokens == 32768 and bound is not None:
            what = f"fused attention of {name} / SDPA on 16 bits, batch {batch}, {tokens} tokens"
            found.append(check(what, row["fused_over_sdpa"], bound, "ratio", True))
        if name == DEFAULT and (plain := fused.get((PLAIN, batch, tokens))):
            what = f"fused attention, {name} / {PLAIN}, batch {batch}, {tokens} tokens"
            found.append(check(what, row["fused_us"] / plain["fused_us"], MOST_OF_PLAIN, "ratio", True))
        what = f"fused attention of {name}, off at batch {batch}, {tokens} tokens"
        found.append(check(what, row["error"], 2e-3, "", True))
    return found
