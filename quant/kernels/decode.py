"""The fused path of a decode step: attention of one query per sequence over packed pages, raw pages and tails.

One launch where a group of threads can see for sure what others of the same launch wrote (CUDA); elsewhere a second one merges
the partial results of a sequence by their log-sum-exp. After Flash-Decoding (Dao et al., 2023); sequences that share a prefix
read it once, after Hydragen (Juravsky et al., 2024).
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
GROUP, WARP = 4, 32
"""Warps of a group, threads of a warp."""
KEY_BITS, VALUE_BITS = (3, 4, 5, 6, 8), (3, 4, 8)

_INPUTS = (
    "queries",
    "keys",
    "values",
    "map",
    "arena",
    "tails",
    "plan",
    "state",
    "settings",
    "sinks",
    "arrivals",
)
FILES = ("plan.h", "shape.h", "query.h", "tile.h", "combine.h", "decode.h")
COMBINE = ("combine.h", "plan.h")
_BODY = """
  using S = DecodeShape<H, R, DK, DV, KB, KG, VB, VG, PACKS, BF, WIDE, MAPS>;
  alignas(16) SHARED unsigned held[GROUP * S::LAID_WORDS > S::QUERY_WORDS ? GROUP * S::LAID_WORDS : S::QUERY_WORDS];
  flash_decode<S, GROUP, T>(
      queries, keys, values, map, arena, tails, plan, state, settings, sinks, SUNK, (GLOBAL unsigned*)arrivals, partial, rows,
      out, held, group, tid, lane, row, col);
"""
_COMBINE = """
  const unsigned sequence = group / HEADS, head = group % HEADS;
  const GLOBAL unsigned* starts = plan + plan[STARTS_AT] + sequence;
  combine<DV, T>(
      partial, partial + plan[ROOM_AT] * (HEADS * DV), plan + plan[ORDER_AT] + starts[0], starts[1] - starts[0], sinks, SUNK,
      HEADS, head, out + group * DV, lane);
"""


def supported(codec: RowCodec, query_heads: int) -> bool:
    """Whether the kernel has this layer's shape and format, on a GPU."""
    shape, format = codec.shape, codec.format
    if backend() == "cpu" or query_heads % shape.heads or query_heads // shape.heads > WIDE_ROWS:
        return False
    if shape.key_dim % 32 or shape.value_dim % 32 or max(shape.key_dim, shape.value_dim) > 256:
        return False
    codes = [(format.keys, KEY_BITS), (format.values, VALUE_BITS)]
    return all(c.bits in bits and c.group in (32, 64) for c, bits in codes if c is not None)


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


@dataclass(frozen=True, slots=True)
class _Launch:
    """What a launch is for one codec, whatever the token: made once for every plan."""

    codec: RowCodec
    layout: Layout
    arrivals: mx.array
    """Of groups, per sequence and KV head: zeros whenever no launch is under way. Launches of one plan follow each other."""
    threads: tuple[int, int]
    """In all, and of a group."""
    decode: Kernel
    template: list[tuple[str, Any]]
    shapes: list[tuple[int, ...]]
    merge: Kernel | None
    merge_template: list[tuple[str, Any]]


def _launch(codec: RowCodec, batch: Batch, heads: int, dtype: mx.Dtype, sunk: bool, mapped: bool) -> _Launch:
    key = id(codec), heads, dtype, sunk, mapped
    made: _Launch | None = batch.launches.get(key)
    if made is None:
        dim, count = codec.shape.value_dim, len(batch.reaches)
        layout = batch.layout(codec, GROUP)
        merges = backend() == "cuda"
        own = [("T", dtype), ("DV", dim), ("HEADS", heads), ("SUNK", sunk)]
        made = batch.launches[key] = _Launch(
            codec, layout, on_device(np.zeros(max(count * codec.shape.heads, 16), np.uint32)),
            (layout.bundles * codec.shape.heads * GROUP * WARP, GROUP * WARP),
            kernel("agentmem_flash_decode", FILES, _BODY, _INPUTS, ("partial", "rows", "out")),
            [("T", dtype), ("GROUP", GROUP), ("SUNK", sunk), *template(codec, heads, batch.wide, mapped).items()],
            [(layout.room, heads, dim + 2), (count, codec.raw_words), (count, heads, 1, dim) if merges else (1,)],
            None if merges else kernel("agentmem_combine", COMBINE, _COMBINE, ("partial", "plan", "sinks"), ("out",)),
            own,
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
    sunk = _nothing() if sinks is None else sinks.astype(mx.float32)
    partial, rows, out = launch.decode(
        inputs=[
            queries, keys, values, _nothing() if vectors is None else vectors, arena, tails[0], launch.layout.plan,
            batch.state, _settings(scale, tails[1]), sunk, launch.arrivals,
        ],
        template=launch.template,
        grid=(launch.threads[0], 1, 1),
        threadgroup=(launch.threads[1], 1, 1),
        output_shapes=launch.shapes,
        output_dtypes=[mx.float32, mx.uint32, queries.dtype],
    )  # fmt: skip
    if launch.merge is not None:
        (out,) = launch.merge(
            inputs=[partial, launch.layout.plan, sunk],
            template=launch.merge_template,
            grid=(count * heads * WARP, 1, 1),
            threadgroup=(WARP, 1, 1),
            output_shapes=[(count, heads, 1, codec.shape.value_dim)],
            output_dtypes=[queries.dtype],
        )
    return out, rows
