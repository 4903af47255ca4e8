"""Attention over remembered rows and the new chunk: the reference path, right on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from agentmem.quant.device import backend
from agentmem.quant.rows import RowCodec

SHORT_FROM, SHORT_TO = 2, 64
"""Chunk lengths that `short_attention` serves on CUDA; a single query has a fused kernel without a plan."""


def rotate(x: mx.array, rotation: str) -> mx.array:
    """Apply the format's orthogonal map along the last axis. q and k rotated alike have unchanged scores."""
    if rotation == "none":
        return x
    if rotation == "hadamard":
        return mx.hadamard_transform(x)
    raise ValueError(f"unknown rotation {rotation!r}")


def dequantised_history(
    codec: RowCodec, raw: Sequence[mx.array], packed: mx.array | None, dtype: mx.Dtype
) -> tuple[list[mx.array], list[mx.array]]:
    """Keys and values of remembered rows: raw row blocks [n, raw_words] first, then packed rows [n, packed_words].

    The order of keys does not matter to softmax: positions are inside the rotated keys already.
    """
    keys, values = [], []
    for rows in raw:
        if rows.shape[0]:
            k, v = codec.unraw(rows, dtype)
            keys.append(k)
            values.append(v)
    if packed is not None:
        k, v = codec.unpack(packed, dtype)
        keys.append(k)
        values.append(v)
    return keys, values


class StoredRows(Protocol):
    """The remembered rows of one layer of one sequence, as the paths read them.

    `offsets` uint32 [packed + raw]: the first word of each stored row in `arena` (uint32 [rows, packed_words]), packed rows
    first; None when nothing is stored. `tail` uint32 [t, raw_words]: rows that are not in the arena yet.
    """

    arena: mx.array
    packed: int
    raw: int
    tail: mx.array

    @property
    def offsets(self) -> mx.array | None: ...

    def packed_rows(self) -> mx.array | None:
        """The packed rows, uint32 [packed, packed_words]."""
        ...

    def raw_blocks(self) -> list[mx.array]:
        """The raw rows and the tail, uint32 [n, raw_words] each."""
        ...


class Path(Protocol):
    """One way to attend: (output [1, H, n, D], the chunk's raw rows uint32 [n, raw_words]).

    queries [1, H, n, D], keys and values [1, H_kv, n, D] of the chunk in model precision, keys and queries rotated as the
    format says. Causal: every stored row is visible to every query.
    """

    def __call__(
        self, codec: RowCodec, stored: StoredRows, queries: mx.array, keys: mx.array, values: mx.array, *,
        scale: float, sinks: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]: ...  # fmt: skip


def whole_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, sinks: mx.array | None = None
) -> mx.array:
    """Causal attention over whole keys and values with the chunk's rows last.

    Fused SDPA, which keeps no score matrix. On CUDA it builds a plan for every new pair of lengths, about 40 ms on an
    H200, so that a short chunk behind a remembered history costs more to plan than to run: those go through `short_attention`.
    Up to 512 tokens, it made composed prompts slower (127 instead of 94 ms), and a long one beside eight streams no faster.
    """
    n = queries.shape[2]
    if SHORT_FROM <= n <= SHORT_TO and sinks is None and backend() == "cuda":
        return short_attention(queries, keys, values, scale=scale)
    mask = "causal" if n > 1 else None
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def short_attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float) -> mx.array:
    """The same for a short chunk, as two products in float32. The score matrix has heads x n x S elements, n <= 64."""
    batch, heads, n, dim = queries.shape
    kv_heads, total = keys.shape[1], keys.shape[2]
    grouped = (queries.astype(mx.float32) * scale).reshape(batch, kv_heads, -1, dim)
    scores = (grouped @ keys.astype(mx.float32).swapaxes(-1, -2)).reshape(batch, kv_heads, -1, n, total)
    hidden = mx.arange(total)[None] > mx.arange(total - n, total)[:, None]
    weights = mx.softmax(mx.where(hidden, -mx.inf, scores), axis=-1).reshape(batch, kv_heads, -1, total)
    out = weights @ values.astype(mx.float32)
    return out.reshape(batch, heads, n, -1).astype(queries.dtype)


def reference_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    history: tuple[list[mx.array], list[mx.array]],
    *,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Causal attention of one sequence's chunk over its history and itself.

    queries [1, H, n, D]; keys, values [1, H_kv, n, D] of the chunk, in model precision; history as given by
    `dequantised_history`.
    """
    old_keys, old_values = history
    all_keys = mx.concatenate([*(k[None] for k in old_keys), keys], axis=2) if old_keys else keys
    all_values = mx.concatenate([*(v[None] for v in old_values), values], axis=2) if old_values else values
    return whole_attention(queries, all_keys, all_values, scale=scale, sinks=sinks)


def reference_path(
    codec: RowCodec, stored: StoredRows, queries: mx.array, keys: mx.array, values: mx.array, *,
    scale: float, sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Attention over dequantised rows, in plain MLX operations: right on any backend."""
    history = dequantised_history(codec, stored.raw_blocks(), stored.packed_rows(), keys.dtype)
    rows = codec.raw(keys[0], values[0])
    return reference_attention(queries, keys, values, history, scale=scale, sinks=sinks), rows
