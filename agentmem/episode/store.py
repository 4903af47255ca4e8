"""Every row that a conversation ever had, layer by layer: what views are chosen from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from agentmem.episode.held import Held
from agentmem.episode.line import Line, empty_line
from agentmem.episode.rows import LayerKind, PackedHeads, kinds_of
from agentmem.quant.keymap import KeyMap
from agentmem.quant.rows import RowCodec


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


class Page(NamedTuple):
    """Rows of tokens that follow one another: words uint32 [n, raw words or packed words]."""

    words: mx.array
    raw: bool


Pages = Callable[[int], Sequence[Page]]


class PageStore:
    """A store in the engine's format: rows with all heads side by side, some raw, most packed.

    Rows that a format leaves raw, in a first page or a tail, are packed here: for the first time, and to the same bits each time.
    """

    def __init__(
        self, codecs: Sequence[RowCodec], key_maps: Sequence[KeyMap], pages: Pages, tokens: int, sinks: int
    ) -> None:
        """`pages` gives a layer's rows in the order of their tokens; the first `sinks` of them are raw."""
        self.kinds: Sequence[LayerKind] = kinds_of(codecs, key_maps)
        self.sinks, self.tokens = sinks, tokens
        self._codecs, self._pages = codecs, pages

    def lead(self, layer: int) -> mx.array:
        first = self._pages(layer)[0]
        assert first.raw
        assert len(first.words) >= self.sinks
        return self._whole(layer, first.words[: self.sinks])

    def rows(self, layer: int, start: int, stop: int) -> mx.array:
        parts, at = [], 0
        for page in self._pages(layer):
            words = page.words[max(0, start - at) : max(0, stop - at)]
            at += len(page.words)
            if len(words):
                parts.append(self._split(layer, words, page.raw))
        return mx.concatenate(parts, axis=1) if parts else empty_line(self.kinds[layer]).tail

    def _split(self, layer: int, words: mx.array, raw: bool) -> mx.array:
        codec, body = self._codecs[layer], self.kinds[layer].body
        if not isinstance(body, PackedHeads):
            return self._whole(layer, words)
        return body.split(codec.pack(words) if raw else words)

    def _whole(self, layer: int, words: mx.array) -> mx.array:
        codec = self._codecs[layer]
        return self.kinds[layer].lead.rows(*codec.unraw(words, codec.stored))
