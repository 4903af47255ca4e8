"""The arena: preallocated memory for the pages in RAM, one array per layer.

On unified memory (CPU, Apple Silicon) host threads read files straight into the arena through numpy views, and MLX sees the
arrays as constants. On a discrete GPU the arrays are updated in place by MLX on the engine thread.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.blockpool.geometry import Geometry
from agentmem.quant.device import unified_memory

Rows = list[np.ndarray]


class Arena(ABC):
    """Memory of `slots` slots. Only the engine thread calls it, except where a method says otherwise."""

    def __init__(self, geometry: Geometry, slots: int) -> None:
        self.geometry = geometry
        self.slots = slots
        self._layers = [
            mx.zeros((slots * geometry.page_tokens, w), dtype=mx.uint32) for w in geometry.packed_words
        ]
        mx.eval(self._layers)

    def layer(self, layer: int) -> mx.array:
        """All rows of one layer, uint32 [slots * page_tokens, packed_words]. To be read in the current step only."""
        return self._layers[layer]

    def packed(self, layer: int, slots: mx.array) -> mx.array:
        """Packed rows of whole slots, lazily: int32 [n] -> uint32 [n * page_tokens, packed_words]."""
        words = self.geometry.packed_words[layer]
        pages = self._layers[layer].reshape(self.slots, -1)[slots]
        return pages.reshape(-1, words)

    def raw(self, layer: int, slots: mx.array, rows: int) -> mx.array:
        """The first `rows` raw rows of one raw page, lazily: uint32 [rows, raw_words]."""
        g = self.geometry
        words, per = g.raw_words[layer], g.raw_per_slot
        pages = self._layers[layer].reshape(self.slots, -1)[slots]
        return pages[:, : per * words].reshape(-1, words)[:rows]

    @abstractmethod
    def write_packed(self, slots: Sequence[int], rows: Sequence[Any], first_row: int = 0) -> None:
        """Put evaluated packed rows of every layer, uint32 [n, packed_words], into slots, from `first_row` of the first on."""

    @abstractmethod
    def write_raw(self, slots: Sequence[int], rows: list[mx.array]) -> None:
        """Put evaluated raw rows of every layer, uint32 [n, raw_words], into the slots of one raw page, from row 0 on."""

    def same(self, a: Sequence[int], b: Sequence[int], rows: int, raw: bool) -> bool:
        """Whether the first `rows` rows of two pages of one kind have the same bits in every layer."""
        take = self._raw_rows if raw else self._packed_rows
        return all(
            mx.array_equal(take(i, a, rows), take(i, b, rows)).item() for i in range(len(self._layers))
        )

    def _raw_rows(self, layer: int, slots: Sequence[int], rows: int) -> mx.array:
        return self.raw(layer, mx.array(list(slots)), rows)

    def _packed_rows(self, layer: int, slots: Sequence[int], rows: int) -> mx.array:
        return self.packed(layer, mx.array(list(slots)))[:rows]

    @abstractmethod
    def collect(self, packed: np.ndarray, raw: np.ndarray) -> Callable[[], tuple[Rows, Rows]]:
        """Copies of rows for the writer: `packed` = slot * page_tokens + row, `raw` = slot * raw_per_slot + row.

        The result may be called on any thread while the slots stay referenced; it gives one array per layer.
        """

    def advance(self) -> bool:
        """Go on with copies that were begun; returns whether there was one. Called between steps."""
        return False


class HostArena(Arena):
    """Arena in memory that the host can address. `view(layer)` is uint32 [slots, slot_words]; host threads may write to
    slots that nobody else references."""

    def __init__(self, geometry: Geometry, slots: int) -> None:
        super().__init__(geometry, slots)
        self._views = [np.array(a, copy=False).reshape(slots, -1) for a in self._layers]
        assert all(
            np.shares_memory(v, np.array(a, copy=False))
            for v, a in zip(self._views, self._layers, strict=True)
        )

    def view(self, layer: int) -> np.ndarray:
        return self._views[layer]

    def write_packed(self, slots: Sequence[int], rows: Sequence[Any], first_row: int = 0) -> None:
        g = self.geometry
        n = rows[0].shape[0]
        where = _packed_rows(slots, first_row, n, g.page_tokens)
        for view, words, new in zip(self._views, g.packed_words, rows, strict=True):
            view.reshape(-1, words)[where] = np.array(new, copy=False)

    def write_raw(self, slots: Sequence[int], rows: list[mx.array]) -> None:
        per = self.geometry.raw_per_slot
        for view, new in zip(self._views, rows, strict=True):
            data = np.array(new, copy=False)
            for i, slot in enumerate(slots):
                part = data[i * per : (i + 1) * per]
                view[slot, : part.size] = part.reshape(-1)

    def collect(self, packed: np.ndarray, raw: np.ndarray) -> Callable[[], tuple[Rows, Rows]]:
        g = self.geometry
        per = g.raw_per_slot

        def copy() -> tuple[Rows, Rows]:
            out_packed = [v.reshape(-1, w)[packed] for v, w in zip(self._views, g.packed_words, strict=True)]
            out_raw = [
                v[:, : per * w].reshape(-1, per, w)[raw // per, raw % per]
                if raw.size
                else np.zeros((0, w), np.uint32)
                for v, w in zip(self._views, g.raw_words, strict=True)
            ]
            return out_packed, out_raw

        return copy


class DeviceArena(Arena):
    """Arena on a discrete GPU. Every write is an eval of its own: read-then-write in one graph would copy the arena."""

    def __init__(self, geometry: Geometry, slots: int) -> None:
        super().__init__(geometry, slots)
        self._copies: deque[Callable[[], None]] = deque()
        self._thread = threading.get_ident()

    def write_packed(self, slots: Sequence[int], rows: Sequence[Any], first_row: int = 0) -> None:
        where = mx.array(_packed_rows(slots, first_row, rows[0].shape[0], self.geometry.page_tokens))
        self._scatter(where, list(rows))

    def write_raw(self, slots: Sequence[int], rows: list[mx.array]) -> None:
        g = self.geometry
        per, n = g.raw_per_slot, rows[0].shape[0]
        images = []
        for slot_words, words, new in zip(g.slot_words, g.raw_words, rows, strict=True):
            padded = mx.pad(new, [(0, len(slots) * per - n), (0, 0)]).reshape(len(slots), per * words)
            image = mx.pad(padded, [(0, 0), (0, slot_words - per * words)])
            images.append(image.reshape(len(slots) * g.page_tokens, -1))
        whole = _packed_rows(slots, 0, len(slots) * g.page_tokens, g.page_tokens)
        self._scatter(mx.array(whole), images)

    def write_rows(
        self, where: np.ndarray, rows: list[mx.array], first_layer: int = 0, *, in_use: bool = True
    ) -> None:
        """Put rows of consecutive layers, uint32 [n, packed_words], at the arena rows `where` (slot * page_tokens + row).

        `in_use`: whether a step that is under way may be reading these layers.
        """
        self._scatter(mx.array(where.astype(np.int32)), rows, first_layer, in_use)

    def _scatter(
        self, where: mx.array, rows: list[mx.array], first_layer: int = 0, in_use: bool = True
    ) -> None:
        if in_use:
            mx.synchronize()  # who still reads an array would make its update a copy
        layers = self._layers[first_layer : first_layer + len(rows)]
        mx.eval(rows)
        for layer, new in zip(layers, rows, strict=True):
            layer[where] = new
        mx.eval(layers)

    def collect(self, packed: np.ndarray, raw: np.ndarray) -> Callable[[], tuple[Rows, Rows]]:
        """The copies are made a layer at a time by `advance`, so that no step waits for all of them. On another thread the
        result waits for them."""
        g = self.geometry
        packed_ids, slot_ids = mx.array(packed), mx.array(raw // g.raw_per_slot)
        row_ids, numbers = mx.array(raw % g.raw_per_slot), mx.arange(len(raw))
        rows: tuple[Rows, Rows] = ([], [])
        complete = threading.Event()

        def copy(layer: int) -> None:
            a, words, per = self._layers[layer], g.raw_words[layer], g.raw_per_slot
            pages = a.reshape(self.slots, -1)[slot_ids][:, : per * words].reshape(-1, per, words)
            rows[0].append(np.array(a[packed_ids]))
            rows[1].append(np.array(pages[numbers, row_ids]))
            if layer + 1 == len(self._layers):
                complete.set()

        self._copies.extend(partial(copy, layer) for layer in range(len(self._layers)))

        def result() -> tuple[Rows, Rows]:
            while threading.get_ident() == self._thread and not complete.is_set():
                self.advance()
            complete.wait()
            return rows

        return result

    def advance(self) -> bool:
        if not self._copies:
            return False
        self._copies.popleft()()
        return True


def _packed_rows(slots: Sequence[int], first_row: int, n: int, page_tokens: int) -> np.ndarray:
    """Row ids (slot * page_tokens + row) of `n` rows that start at `first_row` of the first slot."""
    at = np.arange(first_row, first_row + n)
    return np.asarray(slots, dtype=np.int32)[at // page_tokens] * page_tokens + (at % page_tokens).astype(
        np.int32
    )


def make_arena(geometry: Geometry, budget_bytes: int) -> Arena:
    """An arena of as many slots as fit into `budget_bytes`; raises ValueError when that is not even one page of each kind."""
    slots = budget_bytes // geometry.slot_bytes
    least = 1 + 2 * geometry.slots_for(True, geometry.page_tokens)
    if slots < least:
        raise ValueError(
            f"ram_budget {budget_bytes} bytes holds {slots} KV slots of {geometry.slot_bytes} bytes; "
            f"at least {least} are needed"
        )
    kind = HostArena if unified_memory() else DeviceArena
    return kind(geometry, slots)
