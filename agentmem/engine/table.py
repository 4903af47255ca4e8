"""The page table of one running sequence, and how the model's layers see it.

| page 0, raw | packed | packed | ... (a cut page keeps its first rows) | tail: raw rows, < page_tokens |
  blocks, in the arena                                                   MLX arrays of the sequence
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.blockpool.page import Match, Page, PageTree
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.siblings import ordered
from agentmem.quant.attention import Path

Origin = tuple[Page, int]


@dataclass(slots=True)
class Block:
    """A page of the table.

    `page` is its node in the tree, or None while it is new; `origin` the page whose first rows it took over.
    """

    slots: tuple[int, ...]
    raw: bool
    tokens: np.ndarray
    page: Page | None = None
    origin: Origin | None = None

    @property
    def rows(self) -> int:
        return len(self.tokens)


class Table:
    """State of a sequence's first `len(table)` tokens. Engine thread only.

    Holds a pin on every page and a reference on every slot it uses; `settle` or `release` ends it.
    """

    def __init__(self, pool: Pool, path: Path) -> None:
        self.pool = pool
        self.path = path
        self.blocks: list[Block] = []
        self.tail: list[mx.array] = [mx.zeros((0, w), mx.uint32) for w in pool.geometry.raw_words]
        self.tail_tokens: list[int] = []
        self.tail_origin: Origin | None = None
        self._pinned: list[Page] = []
        self._taken: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(b.rows for b in self.blocks) + len(self.tail_tokens)

    def load(self, match: Match, tokens: int) -> None:
        """Take over the first `tokens` tokens of a match, all of whose pages are in RAM."""
        self.pool.pin(match.pages)
        self._pinned = list(match.pages)
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
            self.blocks.append(Block(page.slots, page.raw, page.tokens, page))
        elif page.raw:
            slots = mx.array(page.slots)
            self.tail = [self.pool.arena.raw(layer, slots, rows) for layer in range(g.layers)]
            self.tail_tokens = [int(t) for t in page.tokens[:rows]]
            self.tail_origin = (page, rows)
        else:
            self.pool.slots.share(page.slots)
            self.blocks.append(Block(page.slots, False, page.tokens[:rows], None, (page, rows)))

    def views(self) -> list[LayerView]:
        """One view per layer for the next forward pass."""
        history = History(self)
        return [LayerView(self, history, layer) for layer in range(self.pool.geometry.layers)]

    def _raw_page(self, number: int) -> bool:
        format = self.pool.geometry.codecs[0].format
        return not format.packs or (format.raw_first_page and number == 0)

    def absorb(self, views: list[LayerView], tokens: list[int]) -> tuple[list[mx.array], Callable[[], None]]:
        """Take in the chunk that the model just ran: returns (arrays to evaluate with the step, what to do after that).

        Full pages are packed once and get slots now; raises Overloaded, changing nothing, when there are none.
        """
        g, p = self.pool.geometry, self.pool.geometry.page_tokens
        rows = [mx.concatenate([old, v.raw_rows()]) for old, v in zip(self.tail, views, strict=True)]
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
        tail = [r[full * p :] for r in rows]

        def apply() -> None:
            self._taken = ()
            for i in range(lead):
                self.pool.arena.write_raw(slots[i], raw[i])
            if packed:
                self.pool.arena.write_packed([s for part in slots[lead:] for s in part], packed)
            for i in range(full):
                origin = self.tail_origin if i == 0 else None
                self.blocks.append(Block(slots[i], kinds[i], all_tokens[i * p : (i + 1) * p], None, origin))
            self.tail = tail
            self.tail_tokens = [int(t) for t in all_tokens[full * p :]]
            if full:
                self.tail_origin = None

        return [*packed, *(a for page in raw for a in page), *tail], apply

    def _take_pages(self, kinds: list[bool]) -> list[tuple[int, ...]]:
        """Slots for full pages, raw where `kinds` says so; all or none."""
        g = self.pool.geometry
        sizes = [g.slots_for(raw, g.page_tokens) for raw in kinds]
        self._taken = self.pool.take(sum(sizes)) if sizes else ()
        taken = iter(self._taken)
        return [tuple(next(taken) for _ in range(n)) for n in sizes]

    def cut(self, tokens: int) -> None:
        """Forget everything behind the first `tokens` tokens."""
        drop = len(self) - tokens
        keep = max(0, len(self.tail_tokens) - drop)
        drop -= len(self.tail_tokens) - keep
        self.tail_tokens, self.tail = self.tail_tokens[:keep], [t[:keep] for t in self.tail]
        self.tail_origin = _clip(self.tail_origin, keep)
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
            slots = mx.array(block.slots)
            self.tail = [
                self.pool.arena.raw(layer, slots, rows) for layer in range(self.pool.geometry.layers)
            ]
            mx.eval(self.tail)
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

        Raises Overloaded, with the table unchanged, when there are none. The table is over afterwards.
        """
        g = self.pool.geometry
        tail_slots = self._settle_tail_slots()
        tree, parent = self.pool.tree_of(root), root
        for block in self.blocks:
            if block.page is None:
                block.page = self._place(tree, parent, block)
            parent = block.page
        if self.tail_tokens:
            if tail_slots is None:
                assert self.tail_origin is not None
                parent = self.tail_origin[0]
            else:
                mx.eval(self.tail)
                self.pool.arena.write_raw(tail_slots, self.tail)
                tail = Block(tail_slots, True, np.array(self.tail_tokens, np.int32), origin=self.tail_origin)
                parent = self._place(tree, parent, tail)
        self._end()
        assert g.layers == len(self.tail)
        return parent

    def _place(self, tree: PageTree, parent: Page, block: Block) -> Page:
        """The block as a page behind `parent`: a new one, or the one that holds the same tokens in the same bits."""
        page = self._same(parent, block)
        if page is not None:
            self.pool.release(block.slots)
            return page
        page = tree.add(parent, block.tokens, raw=block.raw)
        page.origin = block.origin
        self.pool.settle(page, block.slots)
        return page

    def _settle_tail_slots(self) -> tuple[int, ...] | None:
        """Slots for the tail; None when it is a page of the tree as it is, or empty."""
        rows, origin = len(self.tail_tokens), self.tail_origin
        if not rows or (origin is not None and origin[1] == rows == origin[0].rows):
            return None
        return self.pool.take(self.pool.geometry.slots_for(True, rows))

    def _same(self, parent: Page, block: Block) -> Page | None:
        """Two sequences that ran side by side may have computed the same state: one copy is enough."""
        for page in parent.children.same(ordered(block.tokens)):
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
        self.pool.release(self._taken)
        self._end()

    def _end(self) -> None:
        self.pool.unpin(self._pinned)
        self._pinned, self.blocks, self.tail_tokens, self._taken = [], [], [], ()


def _clip(origin: Origin | None, rows: int) -> Origin | None:
    return (origin[0], min(origin[1], rows)) if origin and rows else None


class History:
    """Where a table's stored rows lie: index arrays that are made once per forward pass and shared by all layers."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.length = len(table)
        g = table.pool.geometry
        self._raw_pages = [(mx.array(b.slots), b) for b in table.blocks if b.raw]
        packed = [b for b in table.blocks if not b.raw]
        slots = np.array([b.slots[0] for b in packed], dtype=np.int64)
        self._packed_slots = mx.array(slots.astype(np.int32)) if packed else None
        self._row_ids = (slots[:, None] * g.page_tokens + np.arange(g.page_tokens)).reshape(-1)
        self._packed_rows: mx.array | None = None
        if any(b.rows < g.page_tokens for b in packed):
            rows = np.concatenate([np.arange(b.rows) + i * g.page_tokens for i, b in enumerate(packed)])
            self._packed_rows, self._row_ids = mx.array(rows), self._row_ids[rows]
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
        return [*(arena.raw(layer, slots, b.rows) for slots, b in self._raw_pages), self.table.tail[layer]]

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
            self._offsets[key] = mx.array(np.concatenate(parts).astype(np.uint32))
        return self._offsets[key]


class LayerRows:
    """One layer's stored rows; see `agentmem.quant.attention.StoredRows`."""

    def __init__(self, history: History, layer: int) -> None:
        self._history, self._layer = history, layer
        self.packed, self.raw = history.packed, history.raw
        self.arena = history.table.pool.arena.layer(layer)
        self.tail = history.table.tail[layer]

    @property
    def offsets(self) -> mx.array | None:
        return self._history.offsets(self._layer)

    def packed_rows(self) -> mx.array | None:
        return self._history.packed_rows(self._layer)

    def raw_blocks(self) -> list[mx.array]:
        return self._history.raw_blocks(self._layer)


class LayerView:
    """What one layer of an mlx-lm model gets as its cache for one forward pass over one sequence."""

    def __init__(self, table: Table, history: History, layer: int) -> None:
        self.offset = history.length
        self._table = table
        self._stored = LayerRows(history, layer)
        self._codec = table.pool.geometry.codecs[layer]
        self._key_map = table.pool.geometry.key_maps[layer]
        self._rows: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys, values [1, heads, n, dim] of the chunk; the history joins in `attend`."""
        return keys, values

    def make_mask(self, n: int, window_size: int | None = None, return_array: bool = False) -> str | None:
        """Masks are made in `attend`; a window never reaches us, since such models are refused."""
        assert window_size is None
        return "causal" if n > 1 else None

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:
        """Causal attention over history and chunk; keeps the chunk's rows for `raw_rows`."""
        queries, keys = self._key_map.queries(queries), self._key_map.keys(keys)
        out, self._rows = self._table.path(
            self._codec, self._stored, queries, keys, values, scale=scale, sinks=sinks
        )
        return out

    def raw_rows(self) -> mx.array:
        """The chunk's rows, 16-bit: uint32 [n, raw_words]. Precondition: the model ran."""
        assert self._rows is not None
        return self._rows
