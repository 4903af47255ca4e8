"""One decode step of several sequences: each layer's view of all their tables."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from agentmem.engine.seal import seal
from agentmem.engine.table import Table
from agentmem.engine.views import History, LayerCache, LayerRows, whole_rows
from agentmem.quant.device import on_device
from agentmem.quant.kernels.decode import flash_decode
from agentmem.quant.kernels.plan import Batch
from agentmem.quant.keymap import KeyMap
from agentmem.quant.rows import RowCodec

Failures = dict[int, Exception]
PLAIN = KeyMap()


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
    """One token for each of `tables`, which are not changed before `apply`. Engine thread only."""

    def __init__(self, tables: list[Table], query_heads: int, plans: Plans | None) -> None:
        self.tables, self.pool = tables, tables[0].pool
        self.plan = plans.plan(tables, query_heads) if plans is not None else None
        self._histories = (
            [History(t) for t in tables] if self.plan is None or self.pool.geometry.latent else []
        )

    def views(self) -> list[BatchView | BatchLatentView]:
        """One view for each layer with rows."""
        lengths, g = [len(t) for t in self.tables], self.pool.geometry
        offset = lengths[0] if len(lengths) == 1 else on_device(np.array(lengths, np.int32))
        return [
            BatchLatentView(g.codecs[layer], [LayerRows(h, layer) for h in self._histories], offset)
            if layer in g.latent
            else BatchView(self, layer, offset)
            for layer in range(g.layers)
        ]

    def outer_map(self, layer: int) -> KeyMap:
        """What queries and keys of the model go through before `attend`: nothing, where the kernel does it."""
        key_map = self.pool.geometry.key_maps[layer]
        return PLAIN if self.plan is not None and key_map.vectors is not None else key_map

    def attend(
        self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        """(output [B, H, 1, D], the tokens' rows uint32 [B, raw_words]); queries and keys went through `outer_map`."""
        pool = self.pool
        codec = pool.geometry.codecs[layer]
        if self.plan is not None:
            return flash_decode(
                codec, queries, keys, values, pool.arena.layer(layer), pool.tails.array(layer), self.plan,
                scale=scale, sinks=sinks, vectors=pool.geometry.key_maps[layer].vectors,
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

    def apply(
        self, rows: list[mx.array], tokens: Sequence[int], kept: Sequence[int] | None = None
    ) -> Failures:
        """Give each table its token's row; tails that are full become pages. Only those of `kept`, when it is given.

        rows: uint32 [B, raw_words] of every layer. `tokens` are those of the tables that get theirs. Returns which of all
        tables could not pack their page, and why; they are of no use any more. Precondition: where a tail becomes full, its
        table has reserved the slots, and the rows are evaluated.
        """
        kept = range(len(self.tables)) if kept is None else kept
        tables = [self.tables[i] for i in kept]
        if len(tables) < len(self.tables):
            at = mx.array(list(kept))
            rows = [r[at] for r in rows]
        self.pool.tails.append([t.place for t in tables], [len(t.tail_tokens) for t in tables], rows)
        for table, token in zip(tables, tokens, strict=True):
            table.append(token)
        full = [i for i in kept if self.tables[i].full]
        return {full[n]: error for n, error in seal([self.tables[i] for i in full]).items()}


class BatchView(LayerCache):
    """A layer's cache for one decode step."""

    def __init__(self, step: DecodeStep, layer: int, offset: int | mx.array) -> None:
        super().__init__(offset, step.outer_map(layer))
        self._step, self._layer = step, layer
        self._rows: mx.array | None = None

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        out, self._rows = self._step.attend(self._layer, queries, keys, values, scale, sinks)
        return out

    def rows(self) -> mx.array:
        """The tokens' rows, 16-bit: uint32 [B, raw_words]. Precondition: the model ran."""
        assert self._rows is not None
        return self._rows


class BatchLatentView:
    """The cache of a layer that reads keys and values whole, for one decode step: shorter histories have zeros before them."""

    def __init__(self, codec: RowCodec, stored: list[LayerRows], offset: int | mx.array) -> None:
        self.offset = offset
        self._codec, self._stored = codec, stored
        self._kept = [s.packed + s.raw + s.tail.shape[0] for s in stored]
        self._rows: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys, values [B, heads, 1, dim] of the step -> [B, heads, S, dim], those of the step last."""
        self._rows = mx.concatenate([self._codec.raw(k, v) for k, v in zip(keys, values, strict=True)])
        wholes = [whole_rows(self._codec, s, keys.dtype) for s in self._stored]
        return (
            mx.stack([self._whole(k, one) for (k, _), one in zip(wholes, keys, strict=True)]),
            mx.stack([self._whole(v, one) for (_, v), one in zip(wholes, values, strict=True)]),
        )

    def _whole(self, parts: list[mx.array], own: mx.array) -> mx.array:
        """[heads, S, dim]"""
        gap = max(self._kept) - sum(p.shape[1] for p in parts)
        return mx.concatenate([mx.zeros((own.shape[0], gap, own.shape[2]), own.dtype), *parts, own], axis=1)

    def make_mask(
        self, n: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | None:
        """bool [B, 1, 1, S]: all but what stands before shorter histories; None where there are none."""
        assert n == 1
        assert window_size is None
        most = max(self._kept)
        if min(self._kept) == most:
            return None
        gaps = np.array([[most - kept] for kept in self._kept])
        return on_device((np.arange(most + 1)[None] >= gaps)[:, None, None])

    def rows(self) -> mx.array:
        """The tokens' rows, 16-bit: uint32 [B, raw_words]. Precondition: the model ran."""
        assert self._rows is not None
        return self._rows
