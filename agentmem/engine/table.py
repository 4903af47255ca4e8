"""The page table of one running sequence.

| page 0, raw | packed | packed | ... (a cut page keeps its first rows) | tail: raw rows, < page_tokens |
  blocks, in the arena                                                   a place among the pool's tails

Where something is `shown` in place of the past, its blocks come first; then length and rows are two things.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import numpy as np

from agentmem.blockpool.page import Match, Page, PageTree, veiled
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.siblings import ordered
from agentmem.engine.carry import Carry
from agentmem.engine.shown import Shown
from agentmem.engine.stream import Stream
from agentmem.engine.views import History, LatentView, LayerView
from agentmem.quant.attention import Path
from agentmem.quant.kernels.plan import Reach

Origin = tuple[Page, int]


class HasRows(Protocol):
    """One layer of a chunk, which gives the chunk's rows: uint32 [n, raw_words]."""

    def raw_rows(self) -> mx.array: ...


@dataclass(slots=True)
class Block:
    """A page of the table.

    `page` is its node in the tree, or None while it is new; `origin` the page whose first rows it took over. `kept` are the raw
    rows of every layer that a packed page was made of, while the table `keeps` them.
    """

    slots: tuple[int, ...]
    raw: bool
    tokens: np.ndarray
    page: Page | None = None
    origin: Origin | None = None
    kept: list[mx.array] | None = None

    @property
    def rows(self) -> int:
        return len(self.tokens)


class Table:
    """State of a sequence's first `len(table)` tokens, of which some may have no row. Engine thread only.

    Holds a pin on every page and a reference on every slot it uses; `settle` or `release` ends it. With a `stream`, its pages
    are still on their way: only `views` know how to wait for them. What its sequence carries along is in `carry`.
    While it `keeps`, pages that it packs have their raw rows too.
    """

    def __init__(self, pool: Pool, path: Path) -> None:
        self.pool = pool
        self.path = path
        self.blocks: list[Block] = []
        self.place = pool.tails.take()
        self.tail_tokens: list[int] = []
        self.tail_origin: Origin | None = None
        self._pinned: list[Page] = []
        self.reserved: tuple[int, ...] = ()
        """Slots that were taken for rows to come."""
        self._paged: int | None = None
        self._reach: Reach | None = None
        self.stream: Stream | None = None
        self.keeps = False
        self.shown: Shown | None = None
        self.approximate = False
        self.carry: Carry | None = None

    def __len__(self) -> int:
        if self._paged is None:
            gap = self.shown.gap if self.shown is not None else 0
            self._paged = gap + sum(b.rows for b in self.blocks)
        return self._paged + len(self.tail_tokens)

    def show(self, shown: Shown) -> None:
        """Stand at `shown.tokens` with its rows, all of whose pages are in RAM. Precondition: the table is empty."""
        assert not len(self)
        g = self.pool.geometry
        self.pool.pin(shown.pages)
        self._pinned = shown.pages
        for page in shown.pages:
            assert page.slots is not None
            rows = shown.sinks if page is shown.first else page.rows
            slots = page.slots[: g.slots_for(page.raw, rows)]
            self.blocks.append(Block(slots, page.raw, page.said[:rows], page))
        self.shown, self.approximate = shown, True
        self._blocks_changed()

    def _blocks_changed(self) -> None:
        self._paged, self._reach = None, None

    def load(self, match: Match, tokens: int) -> None:
        """Take over the first `tokens` tokens of a match, all of whose pages are in RAM; behind what is shown, if anything is.

        What comes behind veiled pages is approximate as they are.
        """
        self._blocks_changed()
        self.pool.pin(match.pages)
        self._pinned = [*self._pinned, *match.pages]
        self.approximate = self.approximate or any(page.veiled for page in match.pages)
        left = tokens
        for page in match.pages:
            rows = min(left, page.rows)
            left -= rows
            if rows:
                self._load_page(page, rows)

    def _load_page(self, page: Page, rows: int) -> None:
        assert page.slots is not None
        g = self.pool.geometry
        if rows == page.rows and not (page.raw and rows < g.page_tokens):
            self.blocks.append(Block(page.slots, page.raw, page.said, page))
        elif page.raw:
            self._refill(page.slots, rows)
            self.tail_tokens = [int(t) for t in page.said[:rows]]
            self.tail_origin = (page, rows)
        else:
            self.pool.slots.share(page.slots)
            self.blocks.append(Block(page.slots, False, page.said[:rows], None, (page, rows)))

    def fork(self) -> Table:
        """Another table with the same state: it shares the pages, and has a tail of its own."""
        other = Table(self.pool, self.path)
        other.shown, other.approximate = self.shown, self.approximate
        other._pinned = list(self._pinned)
        self.pool.pin(other._pinned)
        for block in self.blocks:
            if block.page is None:
                self.pool.slots.share(block.slots)
            other.blocks.append(replace(block))
        other.carry = self.carry.fork() if self.carry is not None else None
        other.tail_tokens, other.tail_origin = list(self.tail_tokens), self.tail_origin
        self.pool.tails.write(other.place, 0, [self.tail(i) for i in range(self.pool.geometry.layers)])
        return other

    def _refill(self, slots: tuple[int, ...], rows: int) -> None:
        """The first rows of a raw page become the tail."""
        arena, where = self.pool.arena, mx.array(slots)
        kept = [arena.raw(layer, where, rows) for layer in range(self.pool.geometry.layers)]
        self.pool.tails.write(self.place, 0, kept)

    def tail(self, layer: int) -> mx.array:
        """The tail's rows of one layer, lazily: uint32 [t, raw_words]."""
        return self.pool.tails.rows(layer, self.place, len(self.tail_tokens))

    def tail_copy(self) -> list[mx.array]:
        """The tail's rows of every layer, evaluated, in memory of their own: the tails are written in place."""
        g, n = self.pool.geometry, len(self.tail_tokens)
        out: dict[int, mx.array] = {}
        if not n:
            return []
        for width in set(g.raw_words):
            layers = [i for i, w in enumerate(g.raw_words) if w == width]
            rows = self.pool.tails.whole(layers, [self.place]).reshape(len(layers), g.page_tokens, width)
            mx.eval(rows)
            out |= {layer: rows[i, :n] for i, layer in enumerate(layers)}
        return [out[layer] for layer in range(g.layers)]

    def reach(self) -> Reach:
        """Where the stored rows lie, for the fused path; kept until a block comes or goes."""
        if self._reach is None:
            per = self.pool.geometry.raw_per_slot
            runs = [
                (slot, min(block.rows - i * per, per) if block.raw else block.rows, block.raw)
                for block in self.blocks
                for i, slot in enumerate(block.slots)
            ]
            slots, rows, raw = (np.array([r[k] for r in runs], np.int64) for k in range(3))
            self._reach = Reach(slots, rows, raw.astype(bool), self.place)
        return self._reach

    def views(self) -> list[LayerView | LatentView]:
        """One view for each layer with rows, for the next forward pass."""
        history, g = History(self), self.pool.geometry
        return [
            LatentView(history, layer) if layer in g.latent else LayerView(self, history, layer)
            for layer in range(g.layers)
        ]

    def _raw_page(self, number: int) -> bool:
        format = self.pool.geometry.format
        return not format.packs or (format.raw_first_page and number == 0 and self.shown is None)

    def absorb(
        self, views: Sequence[HasRows], tokens: list[int]
    ) -> tuple[list[mx.array], Callable[[], None]]:
        """Take in the chunk that the model just ran: returns (arrays to evaluate with the step, what to do after that).

        Full pages are packed once and get slots now; raises Overloaded, changing nothing, when there are none.
        """
        g, p = self.pool.geometry, self.pool.geometry.page_tokens
        held = len(self.tail_tokens)
        rows = [
            v.raw_rows() if not held else mx.concatenate([self.tail(i), v.raw_rows()])
            for i, v in enumerate(views)
        ]
        all_tokens = np.array(self.tail_tokens + tokens, dtype=np.int32)
        full = len(all_tokens) // p
        kinds = [self._raw_page(len(self.blocks) + i) for i in range(full)]
        slots = self._take_pages(kinds)
        lead = kinds.index(False) if False in kinds else full
        packed = (
            [c.pack(r[lead * p : full * p]) for c, r in zip(g.codecs, rows, strict=True)]
            if full > lead
            else []
        )
        raw = [[r[i * p : (i + 1) * p] for r in rows] for i in range(lead)]
        kept = [[r[i * p : (i + 1) * p] for r in rows] for i in range(lead, full)] if self.keeps else []
        fresh = 0 if full else held  # rows of the tail that stay where they are
        tail = [r[full * p + fresh :] for r in rows]

        def apply() -> None:
            self.reserved = ()
            for i in range(lead):
                self.pool.arena.write_raw(slots[i], raw[i])
            if packed:
                self.pool.arena.write_packed([s for part in slots[lead:] for s in part], packed)
            for i in range(full):
                origin = self.tail_origin if i == 0 else None
                block = Block(slots[i], kinds[i], all_tokens[i * p : (i + 1) * p], None, origin)
                block.kept = kept[i - lead] if kept and i >= lead else None
                self.blocks.append(block)
            self.pool.tails.write(self.place, fresh, tail)
            self.tail_tokens = [int(t) for t in all_tokens[full * p :]]
            if full:
                self.tail_origin = None
                self._blocks_changed()

        return [*packed, *(a for page in (*raw, *kept) for a in page), *tail], apply

    def reserve(self) -> None:
        """Take the slots that the next row needs, when it fills a page; raises Overloaded when there are none."""
        if self.fills and not self.reserved:
            self._take_pages([self.next_is_raw])

    def unreserve(self) -> None:
        """Give back slots that were taken for rows that did not come."""
        self.pool.release(self.reserved)
        self.reserved = ()

    @property
    def fills(self) -> bool:
        """Whether the next row makes the tail a page."""
        return len(self.tail_tokens) + 1 == self.pool.geometry.page_tokens

    @property
    def full(self) -> bool:
        """Whether the tail has the rows of a page and is to be sealed."""
        return len(self.tail_tokens) == self.pool.geometry.page_tokens

    @property
    def next_is_raw(self) -> bool:
        """Whether the next page stays in 16 bits."""
        return self._raw_page(len(self.blocks))

    def append(self, token: int) -> None:
        """The token's row has been given to the tail."""
        self.tail_tokens.append(token)

    def close_page(self) -> None:
        """The rows of the full tail are in the reserved slots, which are a page now."""
        kept = self.tail_copy() if self.keeps and not self.next_is_raw else None
        slots, self.reserved = self.reserved, ()
        tokens = np.array(self.tail_tokens, np.int32)
        self.blocks.append(Block(slots, self.next_is_raw, tokens, None, self.tail_origin, kept))
        self.tail_tokens, self.tail_origin = [], None
        self._blocks_changed()

    def _take_pages(self, kinds: list[bool]) -> list[tuple[int, ...]]:
        """Slots for full pages, raw where `kinds` says so; all or none."""
        g = self.pool.geometry
        sizes = [g.slots_for(raw, g.page_tokens) for raw in kinds]
        self.reserved = self.pool.take(sum(sizes)) if sizes else ()
        taken = iter(self.reserved)
        return [tuple(next(taken) for _ in range(n)) for n in sizes]

    def cut(self, tokens: int) -> None:
        """Forget everything behind the first `tokens` tokens; somewhat more, where that is not carried along any more."""
        if self.carry is not None:
            tokens = self.carry.cut(tokens)
        drop = len(self) - tokens
        keep = max(0, len(self.tail_tokens) - drop)
        drop -= len(self.tail_tokens) - keep
        self.tail_tokens, self.tail_origin = self.tail_tokens[:keep], _clip(self.tail_origin, keep)
        self._blocks_changed()
        while drop:
            last = self.blocks[-1]
            if last.rows <= drop:
                drop -= last.rows
                self._drop(self.blocks.pop())
                continue
            self._cut_block(last, last.rows - drop)
            drop = 0

    def _cut_block(self, block: Block, rows: int) -> None:
        if block.raw:
            self._refill(block.slots, rows)
            self.tail_tokens = [int(t) for t in block.tokens[:rows]]
            self.tail_origin = (block.page, rows) if block.page else _clip(block.origin, rows)
            self._drop(self.blocks.pop())
            return
        if block.page is not None:
            self.pool.slots.share(block.slots)
            block.origin, block.page = (block.page, rows), None
        block.origin = _clip(block.origin, rows)
        block.tokens = block.tokens[:rows]

    def _drop(self, block: Block) -> None:
        if block.page is None:
            self.pool.release(block.slots)

    def settle(self, root: Page) -> Page:
        """Turn the table into pages of the tree behind `root`; returns the last one. The tail gets slots of its own.

        What is shown stays out: pages come behind its base. New ones are veiled where the table is approximate. Raises
        Overloaded, with the table unchanged, when there are no slots. The table is over afterwards.
        """
        tail_slots = self._settle_tail_slots()
        tree, parent = self.pool.tree_of(root), root if self.shown is None else self.shown.base
        for block in self.blocks[len(self.shown.pages) if self.shown is not None else 0 :]:
            if block.page is None:
                block.page = self._place(tree, parent, block)
            parent = block.page
        if self.tail_tokens:
            if tail_slots is None:
                assert self.tail_origin is not None
                parent = self.tail_origin[0]
            else:
                tails = [self.tail(layer) for layer in range(self.pool.geometry.layers)]
                mx.eval(tails)
                self.pool.arena.write_raw(tail_slots, tails)
                tail = Block(tail_slots, True, np.array(self.tail_tokens, np.int32), origin=self.tail_origin)
                parent = self._place(tree, parent, tail)
        self._end()
        return parent

    def _place(self, tree: PageTree, parent: Page, block: Block) -> Page:
        """The block as a page behind `parent`: a new one, or the one that holds the same tokens in the same bits."""
        tokens = veiled(block.tokens) if self.approximate else block.tokens
        page = self._same(parent, block, tokens)
        if page is not None:
            self.pool.release(block.slots)
            return page
        page = tree.add(parent, tokens, raw=block.raw)
        page.origin = block.origin
        self.pool.settle(page, block.slots)
        return page

    def _settle_tail_slots(self) -> tuple[int, ...] | None:
        """Slots for the tail; None when it is a page of the tree as it is, or empty."""
        rows, origin = len(self.tail_tokens), self.tail_origin
        if not rows or (origin is not None and origin[1] == rows == origin[0].rows):
            return None
        return self.pool.take(self.pool.geometry.slots_for(True, rows))

    def _same(self, parent: Page, block: Block, tokens: np.ndarray) -> Page | None:
        """Two sequences that ran side by side may have computed the same state: one copy is enough."""
        for page in parent.children.same(ordered(tokens)):
            if page.slots is None or page.raw != block.raw:
                continue
            if page.slots == block.slots or self.pool.arena.same(
                page.slots, block.slots, page.rows, page.raw
            ):
                return page
        return None

    def release(self) -> None:
        """Give everything back; pages that were reused stay in the tree."""
        for block in self.blocks:
            self._drop(block)
        self._end()

    def _end(self) -> None:
        self.pool.unpin(self._pinned)
        self.unreserve()
        self.pool.tails.release(self.place)
        self._pinned, self.blocks, self.tail_tokens, self.shown, self.carry = [], [], [], None, None
        self._blocks_changed()


def _clip(origin: Origin | None, rows: int) -> Origin | None:
    return (origin[0], min(origin[1], rows)) if origin and rows else None
