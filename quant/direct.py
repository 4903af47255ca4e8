"""The direct path: a single query multiplied with packed rows as they are, for MLX's CPU backend.

Unpacking a history makes arrays that are written, joined, read once and thrown away; their memory alone costs more than the
arithmetic. Products with packed rows write nothing but scores. The start-up self-test admits the path.
"""

from __future__ import annotations

import mlx.core as mx

from agentmem.quant.attention import StoredRows, dequantised_history, reference_path
from agentmem.quant.device import backend
from agentmem.quant.rows import RowCodec

LONGEST = 1
"""Queries of a chunk that the path serves itself."""


def supported(codec: RowCodec) -> bool:
    """Whether the path is of use here: a CPU, and a format that packs. GPUs have kernels of their own."""
    return backend() == "cpu" and codec.format.packs


def direct_path(
    codec: RowCodec, stored: StoredRows, queries: mx.array, keys: mx.array, values: mx.array, *,
    scale: float, sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Attention of one query over packed rows; see `agentmem.quant.attention.Path`. Longer chunks are served by reference."""
    packed = stored.packed_rows()
    if packed is None or queries.shape[2] > LONGEST or sinks is not None:
        return reference_path(codec, stored, queries, keys, values, scale=scale, sinks=sinks)
    packed_keys, packed_values = codec.parts(packed, keys.dtype)
    old_keys, old_values = dequantised_history(codec, stored.raw_blocks(), None, keys.dtype)
    plain_keys = mx.concatenate([*old_keys, keys[0]], axis=1)
    plain_values = mx.concatenate([*old_values, values[0]], axis=1)
    grouped = (queries * scale).reshape(codec.shape.heads, -1, codec.shape.key_dim)
    scores = [packed_keys.times(grouped, transpose=True), grouped @ plain_keys.swapaxes(-1, -2)]
    weights = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1, precise=True)
    over_packed, over_plain = mx.split(weights, [packed.shape[0]], axis=-1)
    out = packed_values.times(over_packed, transpose=False) + over_plain @ plain_values
    return out.reshape(1, queries.shape[1], 1, -1), codec.raw(keys[0], values[0])
