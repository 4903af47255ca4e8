"""Which rows of new pages one commit writes, and where they will lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from agentmem.blockpool.extent import ExtentData
from agentmem.blockpool.index import ExtentRow
from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.pool import Pool, clip


class CommitRows:
    """Rows of `pages`, all of them in RAM, for one extent. Engine thread only; what `data` gives runs on the writer's.

    Rows that a page took over from one of the `own` pages, and that are on disk, are not written again. Those of other
    sessions are: a few rows in common must not keep another agent's extent alive. `pieces` has one tuple per page.
    """

    def __init__(
        self, pool: Pool, pages: Sequence[Page], extent: ExtentRow, own: Collection[Page] = ()
    ) -> None:
        self._pool, self._pages = pool, pages
        self.pieces: list[tuple[Piece, ...]] = []
        self._rows: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self._tokens: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self._filled = {False: 0, True: 0}
        self._extent = extent
        for page in pages:
            base = _base(page, own)
            covered = sum(p.rows for p in base)
            if covered < page.rows:
                fresh = Piece(extent.id, page.raw, self._filled[page.raw], covered, page.rows - covered)
                base = (*base, fresh)
                self._rows[page.raw].append(self._arena_rows(page, covered))
                self._tokens[page.raw].append(page.tokens[covered:])
                self._filled[page.raw] += fresh.rows
            self.pieces.append(base)

    @property
    def extent(self) -> ExtentRow | None:
        """The extent to be written; None when every row is on disk already."""
        return self._extent if self._filled[False] or self._filled[True] else None

    def _arena_rows(self, page: Page, first: int) -> np.ndarray:
        """Where the page's rows lie, as `Arena.collect` takes them."""
        assert page.slots is not None, "a page without rows on disk left RAM"
        g = self._pool.geometry
        at = np.arange(first, page.rows)
        if not page.raw:
            return page.slots[0] * g.page_tokens + at
        per = g.raw_per_slot
        return np.asarray(page.slots)[at // per] * per + at % per

    def data(self, namespace: str, names: dict[int, str]) -> Callable[[], ExtentData] | None:
        """What the writer thread writes; None when every row is on disk already."""
        if self.extent is None:
            return None
        pool = self._pool
        collect = pool.arena.collect(_joined(self._rows[False]), _joined(self._rows[True]))
        tokens = np.concatenate([np.zeros(0, np.int32), *self._tokens[False], *self._tokens[True]])
        own = self._extent.id
        records = [
            page_record(p, pieces, own, names) for p, pieces in zip(self._pages, self.pieces, strict=True)
        ]

        def data() -> ExtentData:
            packed, raw = collect()
            return ExtentData(pool.fingerprint, namespace, tokens, packed, raw, records)

        return data


def _base(page: Page, own: Collection[Page]) -> tuple[Piece, ...]:
    if page.origin is None or page.origin[0].pieces is None or page.origin[0] not in own:
        return ()
    if page.origin[0].veiled != page.veiled:  # an extent's ids are those of the pages that lie in it
        return ()
    return clip(page.origin[0].pieces, page.origin[1])


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def page_record(page: Page, pieces: tuple[Piece, ...], own: int, names: dict[int, str]) -> dict[str, Any]:
    """From these records the index of pages can be rebuilt; `null` as extent means the extent that holds the record."""
    assert page.parent is not None
    return {
        "key": page.key.hex(),
        "parent": page.parent.key.hex(),
        "raw": page.raw,
        "rows": page.rows,
        "pieces": [[None if p.extent == own else names[p.extent], *p[1:]] for p in pieces],
    }
