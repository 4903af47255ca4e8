"""Reclaim: what a stretch of state is worth, and which pages leave the disk first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator

from agentmem.blockpool.page import Page


def worth(seconds: float, size: int, idle: float, half_life: float) -> float:
    """Seconds of prefill saved per byte kept, halved for every `half_life` seconds without use."""
    return seconds / max(size, 1) * 2.0 ** (-max(idle, 0.0) / half_life)


class Reclaim:
    """Chooses pages to drop from disk until extents of a wanted size are without pages.

    The page that is worth least goes first, but never before the pages behind it, which would be of no use without it.
    `kept` pages stay, and with them everything in front of them.
    """

    def __init__(
        self,
        pages: Iterable[Page],
        *,
        kept: Collection[Page],
        row_bytes: Callable[[bool], int],
        half_life: float,
        now: float,
    ) -> None:
        self._kept = kept
        self._row_bytes, self._half_life, self._now = row_bytes, half_life, now
        self._behind: dict[Page, int] = {}
        self._in_extent: dict[int, int] = {}
        self._heap: list[tuple[float, int, int, Page]] = []
        on_disk = [p for p in pages if p.pieces is not None]
        for page in on_disk:
            for extent in _extents(page):
                self._in_extent[extent] = self._in_extent.get(extent, 0) + 1
            if page.parent is not None:
                self._behind[page.parent] = self._behind.get(page.parent, 0) + 1
        for page in on_disk:
            if not self._behind.get(page):
                self._offer(page)

    def _offer(self, page: Page) -> None:
        if page in self._kept or page.pins:
            return
        value = worth(
            page.rows, page.rows * self._row_bytes(page.raw), self._now - page.last_used, self._half_life
        )
        heapq.heappush(self._heap, (value, -page.start, id(page), page))

    def until(self, need: int, size_of: Callable[[int], int]) -> tuple[list[Page], int]:
        """(pages, bytes of the extents that hold nothing else): at least `need` bytes, or all that may go.

        Pages that would go without freeing a file stay.
        """
        gone: list[Page] = []
        freed: set[int] = set()
        size = 0
        while size < need and self._heap:
            page = heapq.heappop(self._heap)[-1]
            gone.append(page)
            for extent in _extents(page):
                self._in_extent[extent] -= 1
                if not self._in_extent[extent]:
                    freed.add(extent)
                    size += size_of(extent)
            self._uncover(page.parent)
        return list(_useful(gone, freed)), size

    def _uncover(self, page: Page | None) -> None:
        if page is None or page.parent is None:
            return
        self._behind[page] -= 1
        if not self._behind[page] and page.pieces is not None:
            self._offer(page)


def _extents(page: Page) -> set[int]:
    return {p.extent for p in page.pieces or ()}


def _useful(gone: list[Page], freed: set[int]) -> Iterator[Page]:
    """The pages in freed extents and those behind them."""
    dropped: set[Page] = set()
    for page in reversed(gone):
        if page.parent in dropped or _extents(page) & freed:
            dropped.add(page)
            yield page
