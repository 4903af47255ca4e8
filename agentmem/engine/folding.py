"""Folding: a view of an episode in the making, from pages of the pool and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx
import numpy as np

from agentmem.blockpool.page import Page, numbered
from agentmem.blockpool.pool import Pool
from agentmem.episode.line import Line
from agentmem.episode.passes import Sounding
from agentmem.episode.rows import LayerKind, PackedHeads, kinds_of
from agentmem.episode.selection import selected
from agentmem.errors import Overloaded
from agentmem.model.network import Network

PIECE = 64
"""Tokens of a prompt that are read between two looks at who else waits."""
TAKEN = 4
"""Pages of an older view that are taken in at once."""


class Folding:
    """Chooses the rows of a view among those of an older view and of the pages behind it (EpiCache, section 3.2; the
    specification's part C.3). Engine thread only.

    At most `block` new rows compete at once. The view itself is never in the pool meanwhile: its pages are taken in a few at a
    time, and put back a page at a time, so that a view and a block are the most that is in RAM. Rows move as they are stored;
    those of a raw first page are packed, once.
    """

    def __init__(
        self, pool: Pool, network: Network, first: Page, sinks: int, view: Sequence[Page], pages: Sequence[Page],
        prompt: Sequence[int], *, keep: int, block: int,
    ) -> None:  # fmt: skip
        """`first` is page 0 of the session, whose `sinks` rows are in every view and compete in none. `keep`: rows of the view,
        whole pages of them."""
        assert keep % pool.geometry.page_tokens == 0
        self._pool, self._network, self._prompt = pool, network, list(prompt)
        self._keep, self._block = keep, block
        self._first, self._sinks = first, sinks
        self._older = list(view)
        self._begin, self._pages = (self._older, list(pages)) if view else self._divided(pages)
        self.taken: list[Page] = []
        self._words: list[dict[int, mx.array]] = []
        self._stretch: list[Page] = []
        self._sounding: Sounding | None = None

    @cached_property
    def _kinds(self) -> list[LayerKind]:
        g = self._pool.geometry
        return kinds_of(g.codecs, g.key_maps)

    def _divided(self, pages: Sequence[Page]) -> tuple[list[Page], list[Page]]:
        """Pages that are a view without any choice, and those that compete with their rows: one at least."""
        count = rows = 0
        for page in pages[:-1]:
            rows += page.rows - self._spared(page)
            if rows > self._keep:
                break
            count += 1
        return list(pages[:count]), list(pages[count:])

    def _spared(self, page: Page) -> int:
        """Rows of a page that do not compete."""
        return self._sinks if page is self._first else 0

    @property
    def rows(self) -> int:
        """Rows that are held outside of the pool."""
        return sum(int(next(iter(words.values())).shape[0]) for words in self._words)

    @property
    def replaced(self) -> list[Page]:
        """The pages of the older view."""
        return self._older

    @property
    def _taking(self) -> list[Page]:
        """Pages that are taken in next."""
        return self._begin[len(self.taken) :][:TAKEN]

    def wanted(self) -> list[Page]:
        """Pages that must be in RAM, and stay there, for the next step. Those that were `taken` need not."""
        if self._taking:
            return list(dict.fromkeys([self._first, *self._taking]))
        if not self._stretch:
            rows = 0
            for page in self._pages:
                if self._stretch and rows + page.rows > self._block:
                    break
                self._stretch.append(page)
                rows += page.rows
        return list(dict.fromkeys([self._first, *self._stretch]))

    def step(self) -> bool:
        """Take in pages, read a piece of the prompt, or choose; returns whether the view is made. Precondition: what is `wanted`
        is in RAM. Then `wanted` may name other pages.
        """
        if self._taking:
            self._take(self._taking)
            return False
        if self._sounding is None:
            end = self._stretch[-1].end
            layers = range(self._pool.geometry.layers)
            lines = [lambda layer=layer: self._line(layer) for layer in layers]
            self._sounding = Sounding(self._network, lines, self._prompt, end, PIECE)
        if not self._sounding.done:
            self._sounding.step()
            return False
        self._choose(self._sounding.scores)
        self.taken += self._stretch
        self._pages = self._pages[len(self._stretch) :]
        self._stretch, self._sounding = [], None
        return not self._pages

    def _take(self, pages: Sequence[Page]) -> None:
        layers = range(self._pool.geometry.layers)
        words = [{n: mx.contiguous(self._rows(n, p)[self._spared(p) :]) for n in layers} for p in pages]
        mx.eval([list(w.values()) for w in words])
        self._words += words
        self.taken += pages

    def _candidates(self, layer: int) -> mx.array:
        """Rows that compete, uint32 [n, packed_words]: those of the view, then those behind it."""
        parts = [words[layer] for words in self._words]
        parts += [self._rows(layer, page)[self._spared(page) :] for page in self._stretch]
        return mx.concatenate(parts)

    def _rows(self, layer: int, page: Page) -> mx.array:
        """A page's rows as packed ones, uint32 [rows, packed_words]."""
        assert page.slots is not None
        arena, where = self._pool.arena, mx.array(page.slots)
        if page.raw:
            return self._pool.geometry.codecs[layer].pack(arena.raw(layer, where, page.rows))
        return arena.packed(layer, where)[: page.rows]

    def _line(self, layer: int) -> Line:
        """Sinks and candidates as a layer's cache: whoever competes is its tail."""
        kind = self._kinds[layer]
        rows = _by_head(self._pool, layer, kind, self._candidates(layer))
        none = np.zeros(0, np.int32)
        body = rows[:, :0].reshape(0, rows.shape[2])
        return Line(
            kind, self._lead(layer), body, np.zeros(kind.shape.heads, np.int32), none, rows, self._sinks
        )

    def _lead(self, layer: int) -> mx.array:
        codec, page = self._pool.geometry.codecs[layer], self._first
        assert page.slots is not None
        where = mx.array(page.slots)
        if page.raw:
            parts = codec.unraw(self._pool.arena.raw(layer, where, page.rows)[: self._sinks], codec.stored)
        else:
            parts = codec.unpack(self._pool.arena.packed(layer, where)[: self._sinks], codec.stored)
        return self._kinds[layer].lead.rows(*parts)

    def _choose(self, scores: list[list[np.ndarray]]) -> None:
        """Keep of each head its best rows; as many of all heads, so that they lie side by side as tokens' rows do."""
        p = self._pool.geometry.page_tokens
        made: list[dict[int, mx.array]] = [{} for _ in range(self._keep // p)]
        for layer, found in enumerate(scores):
            kind = self._kinds[layer]
            rows = _by_head(self._pool, layer, kind, self._candidates(layer))
            chosen = mx.array(np.stack(selected(found, self._keep)))[:, :, None]
            for i, words in enumerate(made):
                part = mx.take_along_axis(rows, chosen[:, i * p : (i + 1) * p], axis=1)
                words[layer] = _side_by_side(self._pool, layer, kind, part)
            mx.eval([words[layer] for words in made])
            for words in self._words:
                del words[layer]
        self._words = made

    def place(self, number: int) -> Page:
        """Put the view into pages of a chain of its own; returns the last one. `number` tells it from all other views.

        Raises Overloaded, and leaves no page, when there are no slots; the view is lost then.
        """
        p = self._pool.geometry.page_tokens
        tree = self._pool.tree_of(self._first)
        head, placed, ids = tree.root, list[Page](), numbered(number, self._keep)
        try:
            for i in range(self._keep // p):
                slots = self._slots_with(list(self._words.pop(0).values()))
                head = tree.add(head, ids[i * p : (i + 1) * p], raw=not self._packs)
                self._pool.settle(head, slots)
                placed.append(head)
        except Overloaded:
            for page in reversed(placed):
                self._pool.discard(page)
            raise
        return head

    @property
    def _packs(self) -> bool:
        return self._pool.geometry.format.packs

    def _slots_with(self, words: list[mx.array]) -> tuple[int, ...]:
        """A page's words in slots of their own. Raises Overloaded."""
        g = self._pool.geometry
        slots = self._pool.take(g.slots_for(not self._packs, g.page_tokens))
        write = self._pool.arena.write_packed if self._packs else self._pool.arena.write_raw
        write(slots, words)
        return slots


def _by_head(pool: Pool, layer: int, kind: LayerKind, words: mx.array) -> mx.array:
    """Rows as the pool stores them, uint32 [n, packed_words] -> [heads, n, width]."""
    if isinstance(kind.body, PackedHeads):
        return kind.body.split(words)
    codec = pool.geometry.codecs[layer]
    return kind.body.rows(*codec.unraw(words, codec.stored))


def _side_by_side(pool: Pool, layer: int, kind: LayerKind, rows: mx.array) -> mx.array:
    """The inverse of `_by_head`."""
    if isinstance(kind.body, PackedHeads):
        return kind.body.joined(rows)
    codec = pool.geometry.codecs[layer]
    return codec.raw(*kind.body.parts(rows, codec.stored))
