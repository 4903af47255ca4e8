"""Tails: the rows behind the last full page of every running sequence, in 16 bits, in memory of their own.

A running sequence writes a row here with every token. The arena is written only when a page is full, so that host threads
may read it meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from agentmem.blockpool.geometry import Geometry

PLACES = 4
"""Places that there is room for from the beginning; then they move to twice the memory whenever that is full."""


class Tails:
    """Places for up to `page_tokens` rows of every layer, one for each running sequence. Engine thread only.

    The memory grows with the number of sequences that run at once, and is freed when none does.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._widths = sorted(set(geometry.raw_words))
        self._members = {w: [i for i, x in enumerate(geometry.raw_words) if x == w] for w in self._widths}
        self._at = {i: n for layers in self._members.values() for n, i in enumerate(layers)}
        self._arrays: dict[int, mx.array] = {}
        self._free: list[int] = []
        self._count = 0
        self._pending: tuple[list[int], list[int], list[mx.array]] | None = None

    @property
    def used(self) -> int:
        """Sequences that hold a place."""
        return self._count - len(self._free)

    @property
    def bytes(self) -> int:
        return self._count * self.geometry.page_tokens * self.geometry.raw_row_bytes

    def take(self) -> int:
        """A place for one sequence."""
        if not self._free:
            self._grow()
        return self._free.pop()

    def release(self, place: int) -> None:
        assert place not in self._free
        self._free.append(place)
        if not self.used:
            self._arrays, self._free, self._count, self._pending = {}, [], 0, None

    def _grow(self) -> None:
        self.flush()
        before, self._count = self._count, max(PLACES, 2 * self._count)
        for width in self._widths:
            shape = (len(self._members[width]), self._count, self.geometry.page_tokens, width)
            new = mx.zeros(shape, mx.uint32)
            if before:
                new[:, :before] = self._arrays.pop(width)
            mx.eval(new)
            self._arrays[width] = new
        self._free += range(before, self._count)

    def array(self, layer: int) -> tuple[mx.array, int]:
        """(uint32 [layers of this width, places, page_tokens, raw_words], the word at which this layer begins)."""
        self.flush()
        width = self.geometry.raw_words[layer]
        return self._arrays[width], self._at[layer] * self._count * self.geometry.page_tokens * width

    def rows(self, layer: int, place: int, n: int) -> mx.array:
        """The first `n` rows of a place, lazily: uint32 [n, raw_words]."""
        self.flush()
        return self._arrays[self.geometry.raw_words[layer]][self._at[layer], place, :n]

    def whole(self, layers: Sequence[int], places: Sequence[int]) -> mx.array:
        """All rows of some places, layer after layer, lazily: uint32 [layers * places * page_tokens, raw_words].

        The layers must be of one width.
        """
        self.flush()
        width = self.geometry.raw_words[layers[0]]
        at = mx.array([self._at[layer] for layer in layers])
        return self._arrays[width][at[:, None], mx.array(list(places))].reshape(-1, width)

    def write(self, place: int, first: int, rows: Sequence[mx.array]) -> None:
        """Put rows of every layer, uint32 [n, raw_words], into a place; evaluated when it returns."""
        self.flush()
        n = rows[0].shape[0]
        if not n:
            return
        mx.eval(list(rows))
        for width, layers in self._members.items():
            self._arrays[width][:, place, first : first + n] = mx.stack([rows[i] for i in layers])
        mx.eval(list(self._arrays.values()))

    def append(self, places: list[int], at: list[int], rows: list[mx.array]) -> None:
        """One evaluated row for each of several places, every layer: uint32 [places, raw_words], at row `at` of each.

        It becomes part of the next graph that reads tails: writes before reads, so that nothing is copied.
        """
        self.flush()
        self._pending = places, at, rows

    def flush(self) -> None:
        """Make what was appended last part of the arrays, lazily."""
        if self._pending is None:
            return
        (places, at, rows), self._pending = self._pending, None
        where, row = mx.array(places), mx.array(at)
        for width, layers in self._members.items():
            self._arrays[width][:, where, row] = mx.stack([rows[i] for i in layers])
