"""The pool: pages in RAM under a byte budget. Belongs to the engine thread.

free slot -- take --> held by a working table or a restore -- adopt/settle --> page.slots -- evict --> free slot
"""

from __future__ import annotations

import time

import numpy as np

from agentmem.blockpool.arena import make_arena
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page, PageTree, Piece
from agentmem.blockpool.slots import Slots
from agentmem.errors import Overloaded


class Pool:
    """Arena, slots and page trees of one fingerprint.

    Invariants: a pinned page keeps its slots; a page is evicted only when its rows are on disk (or may be lost, when
    `lossy`); bytes in use never exceed the arena, which is allocated once.
    """

    def __init__(self, geometry: Geometry, budget_bytes: int, fingerprint: str) -> None:
        self.geometry = geometry
        self.fingerprint = fingerprint
        self.arena = make_arena(geometry, budget_bytes)
        self.slots = Slots(self.arena.slots)
        self.lossy = False
        self.evictions = 0
        self._trees: dict[str, PageTree] = {}
        self._resident: dict[Page, None] = {}

    def tree(self, namespace: str) -> PageTree:
        if namespace not in self._trees:
            self._trees[namespace] = PageTree(self.fingerprint, namespace)
        return self._trees[namespace]

    def trees(self) -> list[PageTree]:
        return list(self._trees.values())

    @property
    def capacity_bytes(self) -> int:
        return self.slots.count * self.geometry.slot_bytes

    @property
    def used_bytes(self) -> int:
        return (self.slots.count - self.slots.free) * self.geometry.slot_bytes

    def take(self, n: int) -> tuple[int, ...]:
        """`n` slots, evicting the least recently used pages when none are free.

        Raises Overloaded, having evicted what it could, when pinned or unwritten pages hold the rest.
        """
        if n > self.slots.free:
            self._make_room(n)
        return tuple(self.slots.take(n))

    def _make_room(self, n: int) -> None:
        idle = sorted(
            (p for p in self._resident if self._evictable(p)), key=lambda p: (p.last_used, -p.start)
        )
        for page in idle:
            if self.slots.free >= n:
                return
            self.evict(page)
        if self.slots.free < n:
            raise Overloaded(
                f"{n} KV slots needed, {self.slots.free} free; the rest is in use or not yet on disk"
            )

    def _evictable(self, page: Page) -> bool:
        return page.pins == 0 and (page.pieces is not None or self.lossy)

    def settle(self, page: Page, slots: tuple[int, ...]) -> None:
        """`page` now lies in `slots`; the caller's reference passes to the page."""
        assert page.slots is None
        page.slots = slots
        page.last_used = time.monotonic()
        self._resident[page] = None

    def evict(self, page: Page) -> int:
        """Free a page's slots; returns the bytes that became free."""
        assert page.pins == 0
        assert page.slots is not None
        before = self.slots.free
        self.slots.release(page.slots)
        page.slots = None
        del self._resident[page]
        self.evictions += 1
        return (self.slots.free - before) * self.geometry.slot_bytes

    def release(self, slots: tuple[int, ...]) -> None:
        """Give back slots that never became a page."""
        self.slots.release(slots)

    def pin(self, pages: list[Page]) -> None:
        now = time.monotonic()
        for page in pages:
            page.pins += 1
            page.last_used = now

    def unpin(self, pages: list[Page]) -> None:
        for page in pages:
            assert page.pins > 0
            page.pins -= 1

    def discard(self, page: Page) -> None:
        """Take a page without children out of RAM and out of the tree."""
        if page.slots is not None:
            self.evict(page)
        self.tree_of(page).remove(page)
        page.pieces = None

    def tree_of(self, page: Page) -> PageTree:
        top = page
        while top.parent is not None:
            top = top.parent
        return next(t for t in self._trees.values() if t.root is top)

    def load(
        self, namespace: str, rows: list[tuple[int, int | None, bool, np.ndarray, tuple[Piece, ...]]]
    ) -> dict[int, Page]:
        """Build a namespace's tree from the index; returns pages by id. Rows come parents first."""
        tree = self.tree(namespace)
        pages: dict[int, Page] = {}
        for id_, parent, raw, tokens, pieces in rows:
            page = tree.add(pages[parent] if parent is not None else tree.root, tokens, raw=raw)
            page.id = id_
            page.pieces = pieces if sum(p.rows for p in pieces) == page.rows else None
            pages[id_] = page
        return pages

    def check(self) -> None:
        """Integrity of slots and residency; called when the engine is idle."""
        self.slots.check()
        held = {s for p in self._resident for s in p.slots or ()}
        assert all(p.slots is not None for p in self._resident)
        assert len(held) == self.slots.count - self.slots.free, "slots are held by nobody"


def clip(pieces: tuple[Piece, ...], rows: int) -> tuple[Piece, ...]:
    """The pieces that cover the first `rows` rows of a page."""
    kept = (p._replace(rows=min(p.rows, rows - p.page_row)) for p in pieces if p.page_row < rows)
    return tuple(kept)
