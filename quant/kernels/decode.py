"""The fused path of a decode step: attention of one query per sequence over packed pages, raw pages and tails.

Two launches: `flash_decode` gives a partial result for every (item, sequence), `combine` merges those of a sequence by their
log-sum-exp. After Flash-Decoding (Dao et al., 2023); sequences that share a prefix read it once, after Hydragen (Juravsky et
al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.quant.device import backend, on_device
from agentmem.quant.kernels.plan import WIDE_ROWS, Batch, Layout
from agentmem.quant.kernels.source import Kernel, kernel
from agentmem.quant.rows import RowCodec

LOG2_E = 1.4426950408889634
MERGE_THREADS = 512  # as many warps as combine.h has
SHARED_WORDS = 8192
"""Of a group of warps: as much as a Metal device has."""
ROOM = 64  # entries: memory of a size that a step has given back is had again at once, of another it is not
BITS = (3, 4, 8)

_INPUTS = (
    "queries",
    "keys",
    "values",
    "map",
    "arena",
    "tails",
    "items",
    "entries",
    "runs",
    "state",
    "settings",
)
FILES = ("shape.h", "query.h", "decode.h")
_PARTIAL = [mx.float32, mx.float32, mx.uint32]
_BODY = """
  using S = DecodeShape<H, R, DK, DV, KB, KG, VB, VG, PACKS, BF, WIDE, MAPS>;
  SHARED unsigned held[GROUP * S::HELD];
  flash_decode<S, T>(
      queries, keys, values, map, arena, tails, items, entries, runs, state, settings, items_shape[0], partial, stats, rows,
      held + tid / 32 * S::HELD, group * GROUP + tid / 32, lane, row, col);
"""
_COMBINE = """
  SHARED float weights[AT_ONCE], parts[WARPS * (DV + 1)], tops[WARPS];
  SHARED unsigned places[AT_ONCE];
  combine<DV, T>(partial, stats, starts, order, sinks, SUNK, HEADS, out, weights, places, parts, tops, group, tid, lane);
"""


def supported(codec: RowCodec, query_heads: int) -> bool:
    """Whether the kernel has this layer's shape and format, on a GPU."""
    shape, format = codec.shape, codec.format
    if backend() == "cpu" or query_heads % shape.heads or query_heads // shape.heads > WIDE_ROWS:
        return False
    if shape.key_dim % 32 or shape.value_dim % 32 or max(shape.key_dim, shape.value_dim) > 256:
        return False
    codes = [c for c in (format.keys, format.values) if c is not None]
    return all(c.bits in BITS and c.group in (32, 64) for c in codes)


def template(codec: RowCodec, query_heads: int, wide: bool, mapped: bool) -> dict[str, Any]:
    """The constants that a kernel is compiled for. Raw rows need groups too: of dims that a lane holds."""
    shape, keys, values = codec.shape, codec.format.keys, codec.format.values
    group = 64 if shape.key_dim % 64 == 0 and shape.value_dim % 64 == 0 else 32
    return {
        "H": shape.heads, "R": query_heads // shape.heads, "DK": shape.key_dim, "DV": shape.value_dim,
        "KB": keys.bits if keys else 4, "KG": keys.group if keys else group,
        "VB": values.bits if values else 4, "VG": values.group if values else group,
        "PACKS": codec.format.packs, "BF": codec.stored == mx.bfloat16, "WIDE": wide, "MAPS": mapped,
    }  # fmt: skip


def _group(codec: RowCodec, wide: bool) -> int:
    """Warps of a group: of 4, or fewer where their queries take too much shared memory."""
    pairs, dim = (8 if wide else 4), codec.shape.key_dim
    return 4 if 4 * pairs * (dim + dim // 16) <= SHARED_WORDS else 2


@dataclass(frozen=True, slots=True)
class _Launch:
    """What both launches are for one codec, whatever the token: made once for every plan."""

    codec: RowCodec
    layout: Layout
    threads: tuple[int, int]
    """In all, and of a group."""
    decode: Kernel
    template: list[tuple[str, Any]]
    merge: Kernel
    merge_template: list[tuple[str, Any]]
    shapes: list[tuple[int, ...]]


def _launch(codec: RowCodec, batch: Batch, heads: int, dtype: mx.Dtype, sunk: bool, mapped: bool) -> _Launch:
    key = id(codec), heads, dtype, sunk, mapped
    made: _Launch | None = batch.launches.get(key)
    if made is None:
        layout, dim = batch.layout(codec), codec.shape.value_dim
        entries = -(-batch.entries.size // ROOM) * ROOM
        warps, group = layout.items.shape[0] * codec.shape.heads, _group(codec, batch.wide)
        made = batch.launches[key] = _Launch(
            codec, layout, (-(-warps // group) * group * 32, group * 32),
            kernel("agentmem_flash_decode", FILES, _BODY, _INPUTS, ("partial", "stats", "rows")),
            [("T", dtype), ("GROUP", group), *template(codec, heads, batch.wide, mapped).items()],
            kernel("agentmem_combine", ("combine.h",), _COMBINE, ("partial", "stats", "starts", "order", "sinks"), ("out",)),
            [("T", dtype), ("DV", dim), ("HEADS", heads), ("SUNK", sunk)],
            [(entries, heads, dim), (entries, heads, 2), (len(batch.reaches), codec.raw_words)],
        )  # fmt: skip
    return made


@cache
def _nothing() -> mx.array:
    """In the place of vectors; long enough for a device's own memory."""
    made = mx.zeros(16)
    mx.async_eval(made)
    return made


@lru_cache(maxsize=1024)
def _settings(scale: float, tails_at: int) -> mx.array:
    made = on_device(np.array([np.float32(scale * LOG2_E).view(np.uint32), tails_at], np.uint32))
    mx.async_eval(made)  # it outlives the thread that asks for it first
    return made


def flash_decode(
    codec: RowCodec, queries: mx.array, keys: mx.array, values: mx.array, arena: mx.array, tails: tuple[mx.array, int],
    batch: Batch, *, scale: float, sinks: mx.array | None = None, vectors: mx.array | None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """([B, H, 1, value_dim] of the queries' dtype, the tokens' raw rows uint32 [B, raw_words]).

    queries [B, H, 1, key_dim] and the tokens' own keys and values [B, H_kv, 1, dim], mapped as the format says, or else to be
    mapped by `vectors` (see `KeyMap`). arena uint32:
    the layer's rows; tails: an array uint32 [..., page_tokens, raw_words] and the word at which the layer's begin. Every
    stored row of a sequence and its own token are visible to its query, from `batch.advance`'s lows on.
    Precondition: `supported(codec, H)`.
    """
    count, heads, _, _ = queries.shape
    launch = _launch(codec, batch, heads, queries.dtype, sinks is not None, vectors is not None)
    partial, stats, rows = launch.decode(
        inputs=[
            queries, keys, values, _nothing() if vectors is None else vectors, arena, tails[0], launch.layout.items,
            batch.entries, launch.layout.runs, batch.state, _settings(scale, tails[1]),
        ],
        template=launch.template,
        grid=(launch.threads[0], 1, 1),
        threadgroup=(launch.threads[1], 1, 1),
        output_shapes=launch.shapes,
        output_dtypes=_PARTIAL,
    )  # fmt: skip
    sunk = sinks.astype(mx.float32) if sinks is not None else stats
    (out,) = launch.merge(
        inputs=[partial, stats, batch.starts, batch.order, sunk],
        template=launch.merge_template,
        grid=(count * heads * MERGE_THREADS, 1, 1),
        threadgroup=(MERGE_THREADS, 1, 1),
        output_shapes=[(count, heads, 1, codec.shape.value_dim)],
        output_dtypes=[queries.dtype],
    )
    return out, rows
