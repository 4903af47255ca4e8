"""Keys and values of a text, held as a format says: what the engine would have of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from agentmem.blockpool.pool import Pool
from agentmem.engine.layout import Layout
from agentmem.engine.table import Table
from agentmem.quant.paths import chosen
from agentmem.quant.selftest import self_tests


class _Rows:
    """Rows of one layer, as a layer view gives them after a forward pass."""

    def __init__(self, rows: mx.array) -> None:
        self._rows = rows

    def raw_rows(self) -> mx.array:
        return self._rows


def held(plan: Layout, ids: Sequence[int], layers: Sequence[tuple[mx.array, mx.array]], room: int) -> Table:
    """A table of its own over `ids`, with keys (rotated) and values [heads, len(ids), dim] of each layer.

    `room`: tokens that it will hold in all. The caller releases it.
    """
    geometry = plan.geometry
    pool = Pool(geometry, geometry.worst_slots(room) * geometry.slot_bytes, "bench")
    table = Table(pool, chosen(self_tests(plan.codecs, plan.query_heads, plan.dtype)))
    rows: Any = [
        _Rows(codec.raw(key_map.keys(keys[None])[0], values))
        for codec, key_map, (keys, values) in zip(geometry.codecs, geometry.key_maps, layers, strict=True)
    ]
    arrays, apply = table.absorb(rows, list(ids))
    mx.eval(arrays)
    apply()
    return table


def log_p(logits: mx.array) -> mx.array:
    """Logarithms of the probabilities that logits [..., vocab] stand for, float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
