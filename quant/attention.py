"""Attention over remembered rows and the new chunk: the reference path, right on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
from agentmem.quant.rows import RowCodec


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
    `dequantised_history`. Every history row is visible to every query. Fused SDPA: no score matrix is kept.
    """
    old_keys, old_values = history
    all_keys = mx.concatenate([*(k[None] for k in old_keys), keys], axis=2) if old_keys else keys
    all_values = mx.concatenate([*(v[None] for v in old_values), values], axis=2) if old_values else values
    mask = "causal" if queries.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(
        queries, all_keys, all_values, scale=scale, mask=mask, sinks=sinks
    )


Attention = Callable[..., mx.array]
PATHS: dict[str, Attention] = {"reference": reference_attention}
