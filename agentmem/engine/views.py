"""How the model's layers see the table of one sequence during a forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask

from agentmem.quant.attention import dequantised_history
from agentmem.quant.device import on_device
from agentmem.quant.keymap import KeyMap
from agentmem.quant.rows import RowCodec

if TYPE_CHECKING:
    from agentmem.engine.table import Table


class History:
    """Where a table's stored rows lie: index arrays that are made once per forward pass and shared by all layers."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.length = len(table)
        g = table.pool.geometry
        self._raw_pages = [(on_device(np.array(b.slots, np.int32)), b) for b in table.blocks if b.raw]
        packed = [b for b in table.blocks if not b.raw]
        slots = np.array([b.slots[0] for b in packed], dtype=np.int64)
        self._packed_slots = on_device(slots.astype(np.int32)) if packed else None
        self._row_ids = (slots[:, None] * g.page_tokens + np.arange(g.page_tokens)).reshape(-1)
        self._packed_rows: mx.array | None = None
        if any(b.rows < g.page_tokens for b in packed):
            rows = np.concatenate([np.arange(b.rows) + i * g.page_tokens for i, b in enumerate(packed)])
            self._packed_rows, self._row_ids = on_device(rows), self._row_ids[rows]
        self.packed = len(self._row_ids)
        self.raw = sum(b.rows for _, b in self._raw_pages)
        self._offsets: dict[tuple[int, int], mx.array] = {}

    def packed_rows(self, layer: int) -> mx.array | None:
        """The packed rows of one layer, lazily."""
        if self._packed_slots is None:
            return None
        rows = self.table.pool.arena.packed(layer, self._packed_slots)
        return rows if self._packed_rows is None else rows[self._packed_rows]

    def raw_blocks(self, layer: int) -> list[mx.array]:
        """The raw pages of one layer and the tail, lazily."""
        arena = self.table.pool.arena
        return [*(arena.raw(layer, slots, b.rows) for slots, b in self._raw_pages), self.table.tail(layer)]

    def offsets(self, layer: int) -> mx.array | None:
        """First word of each stored row in the layer's arena, packed rows first; layers of equal geometry share it."""
        g = self.table.pool.geometry
        if not self.packed and not self.raw:
            return None
        key = g.packed_words[layer], g.raw_words[layer]
        if key not in self._offsets:
            parts = [self._row_ids * key[0]]
            for _, block in self._raw_pages:
                at = np.arange(block.rows)
                slots = np.asarray(block.slots)[at // g.raw_per_slot]
                parts.append(slots * g.slot_words[layer] + at % g.raw_per_slot * key[1])
            self._offsets[key] = on_device(np.concatenate(parts).astype(np.uint32))
        return self._offsets[key]


class LayerRows:
    """One layer's stored rows; see `agentmem.quant.attention.StoredRows`."""

    def __init__(self, history: History, layer: int) -> None:
        self._history, self._layer = history, layer
        self.packed, self.raw = history.packed, history.raw
        self.arena = history.table.pool.arena.layer(layer)
        self.tail = history.table.tail(layer)

    @property
    def offsets(self) -> mx.array | None:
        return self._history.offsets(self._layer)

    def packed_rows(self) -> mx.array | None:
        return self._history.packed_rows(self._layer)

    def raw_blocks(self) -> list[mx.array]:
        return self._history.raw_blocks(self._layer)


class LayerCache(ABC):
    """What one layer of an mlx-lm model gets as its cache for one forward pass: keys go to `attend` as they come."""

    def __init__(self, offset: int | mx.array, key_map: KeyMap) -> None:
        self.offset = offset
        self._key_map = key_map

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys, values [rows, heads, n, dim] of the pass; histories join in `attend`."""
        return keys, values

    def make_mask(self, n: int, window_size: int | None = None, return_array: bool = False) -> str | None:
        """Masks are made in `attend`; a window never reaches us, since such models are refused."""
        assert window_size is None
        return "causal" if n > 1 else None

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:  # fmt: skip
        """Causal attention over the histories and the pass; keeps the rows of the pass."""
        return self._attend(self._key_map.queries(queries), self._key_map.keys(keys), values, scale, sinks)

    @abstractmethod
    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array: ...


class LayerView(LayerCache):
    """A layer's cache for a pass over one sequence."""

    def __init__(self, table: Table, history: History, layer: int) -> None:
        super().__init__(history.length, table.pool.geometry.key_maps[layer])
        self._path, self._codec = table.path, table.pool.geometry.codecs[layer]
        self._stored, self._layer, self._stream = LayerRows(history, layer), layer, table.stream
        self._rows: mx.array | None = None

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        if self._stream is not None and not self._stream.has(self._layer):
            mx.async_eval(queries, keys, values)  # the layers before this one are computed meanwhile
            self._stream.wait(self._layer)
        out, self._rows = self._path(
            self._codec, self._stored, queries, keys, values, scale=scale, sinks=sinks
        )
        return out

    def raw_rows(self) -> mx.array:
        """The chunk's rows, 16-bit: uint32 [n, raw_words]. Precondition: the model ran."""
        assert self._rows is not None
        return self._rows


class LatentView:
    """A layer's cache that hands out whole keys and values, those of the history first; the model attends by itself."""

    def __init__(self, history: History, layer: int) -> None:
        self.offset = history.length
        self._codec: RowCodec = history.table.pool.geometry.codecs[layer]
        self._history, self._layer = history, layer
        self._rows: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys, values [1, heads, n, dim] of the pass -> [1, heads, S, dim], with the rows that are kept."""
        self._rows = self._codec.raw(keys[0], values[0])
        old_keys, old_values = whole_rows(self._codec, LayerRows(self._history, self._layer), keys.dtype)
        return (
            mx.concatenate([*(k[None] for k in old_keys), keys], axis=2),
            mx.concatenate([*(v[None] for v in old_values), values], axis=2),
        )

    def make_mask(
        self, n: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The history is visible to all tokens of the pass."""
        assert window_size is None
        if n == 1:
            return None
        kept = self._history.packed + self._history.raw + len(self._history.table.tail_tokens)
        return create_causal_mask(n, kept) if return_array else "causal"

    def raw_rows(self) -> mx.array:
        """The chunk's rows, 16-bit: uint32 [n, raw_words]. Precondition: the model ran."""
        assert self._rows is not None
        return self._rows


def whole_rows(codec: RowCodec, stored: LayerRows, dtype: mx.Dtype) -> tuple[list[mx.array], list[mx.array]]:
    """Keys and values [heads, n, dim] of the rows that are kept, in parts."""
    return dequantised_history(codec, stored.raw_blocks(), stored.packed_rows(), dtype)
