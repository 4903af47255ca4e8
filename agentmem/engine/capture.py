"""What a turn computed, in the 16 bits in which the model had it: taken out of a table before it is over."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from agentmem.compose.rotation import Rotation
from agentmem.compose.state import State, joined
from agentmem.engine.table import Table


class Capture:
    """The rows of a table that are there in 16 bits, from token `first` on: those of its raw pages, of its tail, and of pages
    that it packed while it kept them."""

    def __init__(self, table: Table, rotations: Sequence[Rotation], first: int = 0) -> None:
        self._geometry, self._rotations = table.pool.geometry, rotations
        self._first, self._parts = first, list[tuple[int, int, list[mx.array]]]()
        arena, layers, at = table.pool.arena, range(self._geometry.layers), 0
        for block in table.blocks:
            if block.raw:
                slots = mx.array(block.slots)
                self._add(at, block.rows, [arena.raw(layer, slots, block.rows) for layer in layers])
            elif block.kept is not None:
                self._add(at, block.rows, block.kept)
            at += block.rows
        self._add(at, len(table.tail_tokens), table.tail_copy())
        mx.eval([rows for *_, rows in self._parts])

    def _add(self, start: int, n: int, rows: list[mx.array]) -> None:
        skipped = max(0, self._first - start)
        if skipped < n:
            self._parts.append((start + skipped, start + n, [r[skipped:] for r in rows]))

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop, _ in self._parts) * self._geometry.raw_row_bytes

    def has(self, start: int, stop: int) -> bool:
        """Whether all of these tokens are there."""
        return sum(len(part) for part in self._within(start, stop)) == stop - start

    def state(self, start: int, stop: int) -> State:
        """These tokens in the canonical frame. Raises LookupError when not all of them are there."""
        if not self.has(start, stop):
            raise LookupError(f"the state of tokens {start} to {stop} is not there in 16 bits")
        return joined([self._state(span) for span in self._within(start, stop)])

    def _within(self, start: int, stop: int) -> list[range]:
        spans = [range(max(start, first), min(stop, last)) for first, last, _ in self._parts]
        return [span for span in spans if span]

    def _state(self, span: range) -> State:
        """The state of tokens that lie in one part."""
        first, _, rows = next(part for part in self._parts if part[0] <= span.start < part[1])
        keys, values = [], []
        g = self._geometry
        for codec, key_map, rotation, held in zip(g.codecs, g.key_maps, self._rotations, rows, strict=True):
            k, v = codec.unraw(held[span.start - first : span.stop - first], mx.float32)
            keys.append(rotation.unrotate(key_map.restored(k[None])[0], span.start))
            values.append(v)
        return State.of(keys, values)
