"""Keys and values of a text, held as a format says: what the engine would have of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from agentmem.blockpool.pool import Pool
from agentmem.compose.prompt import Prompt
from agentmem.engine.layout import Layout
from agentmem.engine.table import Table
from agentmem.engine.views import History
from agentmem.quant.attention import dequantised_history
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


class Holder:
    """Prompts in a format. Their last token is not held: it is what predictions begin with."""

    def __init__(self, plan: Layout) -> None:
        self._plan = plan

    def table(self, prompt: Prompt, more: int) -> Table:
        """`more`: tokens that it will hold beside. The caller releases it."""
        n = len(prompt) - 1
        layers = []
        for line in prompt.lines:
            assert line.keys is not None
            assert line.values is not None
            layers.append((line.keys[:, :n], line.values[:, :n]))
        return held(self._plan, prompt.ids[:n], layers, n + more)

    def restored(self, prompt: Prompt) -> list[tuple[mx.array, mx.array]]:
        """What the format has made of keys, rotated, and values [heads, n, dim] of each layer.

        Raw rows come first: attention does not mind the order, since positions are in the keys.
        """
        table, out = self.table(prompt, 0), []
        geometry, history = table.pool.geometry, History(table)
        for layer, (codec, key_map) in enumerate(zip(geometry.codecs, geometry.key_maps, strict=True)):
            keys, values = dequantised_history(
                codec, history.raw_blocks(layer), history.packed_rows(layer), self._plan.dtype
            )
            whole = key_map.restored(mx.concatenate(keys, axis=1)[None])[0]
            out.append((whole.astype(self._plan.dtype), mx.concatenate(values, axis=1)))
        mx.eval(out)
        table.release()
        return out


def log_p(logits: mx.array) -> mx.array:
    """Logarithms of the probabilities that logits [..., vocab] stand for, float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
