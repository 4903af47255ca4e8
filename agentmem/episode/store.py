"""Every row that a conversation ever had, layer by layer: what views are chosen from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from agentmem.episode.held import Held
from agentmem.episode.line import Line
from agentmem.episode.rows import LayerKind


class RowStore(Protocol):
    """Row i is token i, in every layer: the first `sinks` of them as `lead`, the others as `body` says.

    Rows never change; new ones come behind the last. A layer's rows may be read from disk when they are asked for.
    """

    kinds: Sequence[LayerKind]
    sinks: int
    tokens: int

    def lead(self, layer: int) -> mx.array:
        """[heads, sinks, width]."""
        ...

    def rows(self, layer: int, start: int, stop: int) -> mx.array:
        """Rows of tokens `start` to `stop`, not before the sinks' end: [heads, stop - start, width]."""
        ...


class MemoryStore:
    """A store in memory, of a cache that nothing was evicted from."""

    def __init__(self, held: Held) -> None:
        assert all(not line.counts.any() for line in held.lines), "rows were evicted"
        self.kinds: Sequence[LayerKind] = [line.kind for line in held.lines]
        self.sinks, self.tokens = held.sinks, held.tokens
        self._leads = [line.lead for line in held.lines]
        self._rows = [line.tail for line in held.lines]

    def lead(self, layer: int) -> mx.array:
        return self._leads[layer]

    def rows(self, layer: int, start: int, stop: int) -> mx.array:
        return self._rows[layer][:, start - self.sinks : stop - self.sinks]

    def append(self, tails: Sequence[mx.array]) -> None:
        """Rows of the tokens behind the last one, [heads, n, width] of each layer."""
        self._rows = [mx.concatenate([old, new], axis=1) for old, new in zip(self._rows, tails, strict=True)]
        mx.eval(self._rows)
        self.tokens = self.sinks + int(self._rows[0].shape[1])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self._leads, *self._rows))


def whole_line(store: RowStore, layer: int) -> Line:
    """All rows of a layer."""
    kind, rows = store.kinds[layer], store.rows(layer, store.sinks, store.tokens)
    none = np.zeros(0, np.int32)
    body = rows[:, :0].reshape(0, rows.shape[2])
    return Line(kind, store.lead(layer), body, np.zeros(kind.shape.heads, np.int32), none, rows, store.sinks)
