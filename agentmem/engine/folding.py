"""Folding: a view of an episode in the making, from pages of the pool and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx
import numpy as np

from agentmem.blockpool.page import Page, veiled
from agentmem.blockpool.pool import Pool
from agentmem.episode.line import Line
from agentmem.episode.passes import Sounding
from agentmem.episode.rows import LayerKind, PackedHeads, kinds_of
from agentmem.episode.selection import selected
from agentmem.model.network import Network

PIECE = 64
"""Tokens of a prompt that are read between two looks at who else waits."""


class Folding:
    """Chooses the rows of a view among those of an older view and of the pages behind it (EpiCache, section 3.2; the
    specification's part C.3). Engine thread only.

    At most `block` new rows compete at once, so that besides a view no more than that is asked into RAM. Rows move as they are
    stored; those of a raw first page are packed, once.
    """

    def __init__(
        self, pool: Pool, network: Network, first: Page, sinks: int, view: Sequence[Page], pages: Sequence[Page],
        prompt: Sequence[int], *, keep: int, block: int,
    ) -> None:  # fmt: skip
        """`first` is page 0 of the session, whose `sinks` rows are in every view and compete in none. `keep`: rows of the view,
        whole pages of them."""
        assert keep % pool.geometry.page_tokens == 0
        self._pool, self._network, self._prompt, self._keep, self._block = (
            pool,
            network,
            list(prompt),
            keep,
            block,
        )
        self._first, self._sinks = first, sinks
        self._view, self._pages, self._taken = list(view), list(pages), 0
        self._words: list[mx.array] | None = None
        self._stretch: list[Page] = []
        self._sounding: Sounding | None = None

    @cached_property
    def _kinds(self) -> list[LayerKind]:
        g = self._pool.geometry
        return kinds_of(g.codecs, g.key_maps)

    @property
    def replaced(self) -> list[Page]:
        """The pages of the older view."""
        return list(self._view)

    def wanted(self) -> list[Page]:
        """Pages that must be in RAM, and stay there, while the next stretch competes."""
        if not self._stretch:
            rows = 0
            for page in self._pages[self._taken :]:
                if self._stretch and rows + page.rows > self._block:
                    break
                self._stretch.append(page)
                rows += page.rows
        view = self._view if self._words is None else []
        return list(dict.fromkeys([self._first, *view, *self._stretch]))

    def step(self) -> bool:
        """Read a piece of the prompt, or choose; returns whether the view is made. Precondition: what is `wanted` is in RAM.

        When a stretch is through, `wanted` names other pages.
        """
        if self._sounding is None:
            end = self._stretch[-1].end
            layers = range(self._pool.geometry.layers)
            lines = [lambda layer=layer: self._line(layer) for layer in layers]
            self._sounding = Sounding(self._network, lines, self._prompt, end, PIECE)
        if not self._sounding.done:
            self._sounding.step()
            return False
        self._choose(self._sounding.scores)
        self._taken += len(self._stretch)
        self._stretch, self._sounding = [], None
        return self._taken == len(self._pages)

    def _candidates(self, layer: int) -> mx.array:
        """Rows that compete, uint32 [n, packed_words]: those of the view, then those behind it."""
        parts = (
            [self._words[layer]] if self._words is not None else [self._rows(layer, p) for p in self._view]
        )
        for page in self._stretch:
            rows = self._rows(layer, page)
            parts.append(rows[self._sinks :] if page is self._first else rows)
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
        words = []
        for layer, found in enumerate(scores):
            kind = self._kinds[layer]
            rows = _by_head(self._pool, layer, kind, self._candidates(layer))
            chosen = np.stack(selected(found, self._keep))
            kept = mx.take_along_axis(rows, mx.array(chosen)[:, :, None], axis=1)
            words.append(_side_by_side(self._pool, layer, kind, kept))
            mx.eval(words[-1])
        self._words = words

    def place(self, number: int) -> Page:
        """Put the view into pages of a chain of its own; returns the last one. `number` tells it from all other views.

        Raises Overloaded, changing nothing, when there are no slots.
        """
        assert self._words is not None
        g, p = self._pool.geometry, self._pool.geometry.page_tokens
        raw = not g.codecs[0].format.packs
        rows = int(self._words[0].shape[0])
        sizes = g.slots_for(raw, p)
        taken = self._pool.take(sizes * (rows // p))
        page = self._pool.tree(self._first_space()).root
        for i in range(rows // p):
            slots = taken[i * sizes : (i + 1) * sizes]
            part = [w[i * p : (i + 1) * p] for w in self._words]
            mx.eval(part)
            if raw:
                self._pool.arena.write_raw(slots, part)
            else:
                self._pool.arena.write_packed(slots, part)
            ids = np.arange(i * p, (i + 1) * p)
            ids[0] = number if i == 0 else ids[0]
            page = self._pool.tree_of(page).add(page, veiled(ids), raw=raw)
            self._pool.settle(page, slots)
        return page

    def _first_space(self) -> str:
        return self._pool.tree_of(self._first).namespace


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
