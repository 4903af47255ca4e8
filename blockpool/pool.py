"""The pool: pages in RAM under a byte budget. Belongs to the engine thread.

free slot -- take --> held by a working table or a restore -- adopt/settle --> page.slots -- evict --> free slot
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import numpy as np

from agentmem.blockpool.arena import make_arena
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page, PageTree, Piece
from agentmem.blockpool.reclaim import worth
from agentmem.blockpool.slots import Slots
from agentmem.blockpool.tails import Tails
from agentmem.errors import Overloaded

RECOMPUTE = 50.0
"""How many times as long it takes to prefill a page as to read it from disk; measured: 4 to 200."""

HALF_LIFE = 600.0
SLACK = 100


class Pool:
    """Arena, slots and page trees of one fingerprint.

    Invariants: a pinned page keeps its slots; a page is evicted only when its rows are on disk, or may be lost (it is
    `volatile`, or the pool is `lossy`); bytes in use never exceed the arena, which is allocated once.

    `protected` names pages that leave RAM only when nothing else can. `lost` gathers pages that left it unwritten.
    """

    def __init__(self, geometry: Geometry, budget_bytes: int, fingerprint: str) -> None:
        self.geometry = geometry
        self.fingerprint = fingerprint
        self.arena = make_arena(geometry, budget_bytes)
        self.slots = Slots(self.arena.slots)
        self.tails = Tails(geometry)
        self.lossy = False
        self.evictions = 0
        self.protected: Callable[[], Collection[Page]] = set
        self.lost: list[Page] = []
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
        """`n` slots, evicting the pages that are worth least when none are free.

        Raises Overloaded, having evicted what it could, when pinned or unwritten pages hold the rest.
        """
        if n > self.slots.free:
            self._make_room(n)
        return tuple(self.slots.take(n))

    def _make_room(self, n: int) -> None:
        """Free `n` slots and a few more, so that a full pool is not sorted for every page."""
        wanted = min(self.slots.count, n + self.slots.count // SLACK)
        protected, now = self.protected(), time.monotonic()

        def rank(page: Page) -> tuple[bool, float, int]:
            seconds = RECOMPUTE if page.pieces is None else 1.0
            return page in protected, worth(seconds, 1, now - page.last_used, HALF_LIFE), -page.start

        while self.slots.free < wanted:
            idle = sorted(filter(self._evictable, self._resident), key=rank)
            if not idle:
                break
            for page in idle:
                if self.slots.free >= (n if page in protected else wanted):
                    break
                if self._evictable(page):
                    self.evict(page)
            else:
                continue
            break
        if self.slots.free < n:
            raise Overloaded(
                f"{n} KV slots needed, {self.slots.free} free; the rest is in use or not yet on disk"
            )

    def _evictable(self, page: Page) -> bool:
        if page.pins:
            return False
        if page.pieces is None and not self.lossy:
            return page.volatile and not any(c.stored for c in page.children)
        return True

    def settle(self, page: Page, slots: tuple[int, ...]) -> None:
        """`page` now lies in `slots`; the caller's reference passes to the page."""
        assert page.slots is None
        page.slots = slots
        page.last_used = time.monotonic()
        self._resident[page] = None

    def evict(self, page: Page) -> int:
        """Free a page's slots; returns the bytes that became free."""
        self.evictions += 1
        if page.pieces is None:
            self.lost.append(page)
        return self._free(page)

    def _free(self, page: Page) -> int:
        assert page.pins == 0
        assert page.slots is not None
        before = self.slots.free
        self.slots.release(page.slots)
        page.slots = None
        del self._resident[page]
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
            self._free(page)
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
