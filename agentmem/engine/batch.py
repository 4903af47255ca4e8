"""One decode step of several sequences: each layer's view of all their tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from agentmem.engine.table import Table
from agentmem.engine.views import History, LayerRows
from agentmem.quant.kernels.decode import flash_decode
from agentmem.quant.kernels.plan import Batch


class Plans:
    """The last plan of the fused path, kept as long as the same tables hold the same blocks."""

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()
        self._plan: Batch | None = None

    def plan(self, tables: list[Table], query_heads: int) -> Batch:
        reaches = [t.reach() for t in tables]
        key = tuple(id(r) for r in reaches)
        if self._plan is None or key != self._key:
            g = tables[0].pool.geometry
            heads = g.codecs[0].shape.heads
            self._plan, self._key = Batch(reaches, g.page_tokens, heads, query_heads // heads), key
        self._plan.advance([len(t.tail_tokens) + 1 for t in tables])
        return self._plan


class DecodeStep:
    """One token for each of `tables`. Engine thread only.

    Every table gets its row by `apply`, and a page when its tail is full: the slots for that are taken here, before anything
    runs. Raises Overloaded, changing nothing, when there are none.
    """

    def __init__(self, tables: list[Table], query_heads: int, plans: Plans | None) -> None:
        self.tables, self.pool = tables, tables[0].pool
        self.plan = plans.plan(tables, query_heads) if plans is not None else None
        self._histories = [History(t) for t in tables] if self.plan is None else []

    def views(self) -> list[BatchView]:
        """One view per layer."""
        lengths = [len(t) for t in self.tables]
        offset = lengths[0] if len(lengths) == 1 else mx.array(lengths, dtype=mx.int32)
        return [BatchView(self, layer, offset) for layer in range(self.pool.geometry.layers)]

    def attend(
        self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        """(output [B, H, 1, D], the tokens' rows uint32 [B, raw_words]); queries and keys are mapped already."""
        pool = self.pool
        codec = pool.geometry.codecs[layer]
        if self.plan is not None:
            return flash_decode(
                codec, queries, keys, values, pool.arena.layer(layer), pool.tails.array(layer), self.plan,
                scale=scale, sinks=sinks,
            )  # fmt: skip
        outs, rows = [], []
        for b, (table, history) in enumerate(zip(self.tables, self._histories, strict=True)):
            one = slice(b, b + 1)
            out, row = table.path(
                codec, LayerRows(history, layer), queries[one], keys[one], values[one], scale=scale, sinks=sinks
            )  # fmt: skip
            outs.append(out)
            rows.append(row)
        return (outs[0], rows[0]) if len(outs) == 1 else (mx.concatenate(outs), mx.concatenate(rows))

    def absorb(self, views: list[BatchView], tokens: list[int]) -> tuple[list[mx.array], Callable[[], None]]:
        """(arrays to evaluate with the step, what to do after that). Tails that are full become pages then."""
        rows = [v.rows() for v in views]

        def apply() -> None:
            places = [t.place for t in self.tables]
            self.pool.tails.append(places, [len(t.tail_tokens) for t in self.tables], rows)
            for table, token in zip(self.tables, tokens, strict=True):
                table.tail_tokens.append(token)
                if len(table.tail_tokens) == self.pool.geometry.page_tokens:
                    table.seal()

        return rows, apply


class BatchView:
    """What one layer of an mlx-lm model gets as its cache for one decode step."""

    def __init__(self, step: DecodeStep, layer: int, offset: int | mx.array) -> None:
        self.offset = offset
        self._step, self._layer = step, layer
        self._rows: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys, values [B, heads, 1, dim] of the tokens; the histories join in `attend`."""
        return keys, values

    def make_mask(self, n: int, window_size: int | None = None, return_array: bool = False) -> None:
        assert n == 1
        assert window_size is None

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:
        """Every sequence's query over its own history and token."""
        keymap = self._step.pool.geometry.key_maps[self._layer]
        queries, keys = keymap.queries(queries), keymap.keys(keys)
        out, self._rows = self._step.attend(self._layer, queries, keys, values, scale, sinks)
        return out

    def rows(self) -> mx.array:
        """The tokens' rows, 16-bit: uint32 [B, raw_words]. Precondition: the model ran."""
        assert self._rows is not None
        return self._rows
