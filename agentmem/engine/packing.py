"""Several prompts in one forward pass (prepacking, Zhao et al., 2024): a short one is not padded to the length of a long one.

The tokens of all pieces lie in rows of equal length; each row has the position of its first token, so that rotary positions
are right. Attention puts the rows of a piece together again and runs it over its own history only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from agentmem.engine.table import Table
from agentmem.engine.views import History, LayerCache, LayerRows
from agentmem.quant.device import on_device

ROW = 16
"""Tokens of a row: at most 15 places a piece are empty."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One sequence's chunk: `tokens` in rows [first, end) of the pass."""

    table: Table
    history: History
    tokens: list[int]
    first: int
    end: int

    @property
    def last(self) -> int:
        """The last token's place in the pass."""
        return self.first * ROW + len(self.tokens) - 1


class PackedPass:
    """A prefill pass over chunks of several tables. Engine thread only."""

    def __init__(self, chunks: Sequence[tuple[Table, list[int]]]) -> None:
        self.pieces: list[_Piece] = []
        rows = 0
        for table, tokens in chunks:
            n = -(-len(tokens) // ROW)
            self.pieces.append(_Piece(table, History(table), tokens, rows, rows + n))
            rows += n
        ids, starts = np.zeros((rows, ROW), np.int32), np.zeros(rows, np.int32)
        for p in self.pieces:
            ids[p.first : p.end].reshape(-1)[: len(p.tokens)] = p.tokens
            starts[p.first : p.end] = len(p.table) + ROW * np.arange(p.end - p.first)
        self.ids, self.starts = mx.array(ids), on_device(starts)

    def views(self) -> list[PackedView]:
        """One view per layer."""
        return [PackedView(self, layer) for layer in range(self.pieces[0].table.pool.geometry.layers)]

    def rows_of(self, views: list[PackedView], number: int) -> list[GivenRows]:
        """What `Table.absorb` takes as views of piece `number`."""
        return [GivenRows(v.rows[number]) for v in views]


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Rows of one layer, as a view gives them after a pass: uint32 [n, raw_words]."""

    _rows: mx.array

    def raw_rows(self) -> mx.array:
        return self._rows


class PackedView(LayerCache):
    """A layer's cache for a packed pass."""

    def __init__(self, whole: PackedPass, layer: int) -> None:
        geometry = whole.pieces[0].table.pool.geometry
        super().__init__(whole.starts, geometry.key_maps[layer])
        self.rows: list[mx.array] = []
        self._pieces, self._codec, self._layer = whole.pieces, geometry.codecs[layer], layer

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        outs = []
        for p in self._pieces:
            q, k, v = (_together(x[p.first : p.end], len(p.tokens)) for x in (queries, keys, values))
            stored = LayerRows(p.history, self._layer)
            out, rows = p.table.path(self._codec, stored, q, k, v, scale=scale, sinks=sinks)
            self.rows.append(rows)
            outs.append(_apart(out, p.end - p.first))
        return mx.concatenate(outs)


def _together(rows: mx.array, tokens: int) -> mx.array:
    """[rows, heads, ROW, dim] -> [1, heads, tokens, dim]."""
    _, heads, _, dim = rows.shape
    return rows.transpose(1, 0, 2, 3).reshape(1, heads, -1, dim)[:, :, :tokens]


def _apart(out: mx.array, rows: int) -> mx.array:
    """[1, heads, tokens, dim] -> [rows, heads, ROW, dim], zeros behind the last token."""
    _, heads, tokens, dim = out.shape
    whole = mx.pad(out, [(0, 0), (0, 0), (0, rows * ROW - tokens), (0, 0)])
    return whole.reshape(heads, rows, ROW, dim).transpose(1, 0, 2, 3)
