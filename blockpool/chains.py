"""Chains of pages as the headers of extents tell them: from these the index of pages can be rebuilt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.blockpool.extent import SUFFIX, Extent, ExtentCorrupt
from agentmem.blockpool.page import Page, Piece, page_key, root_key
from agentmem.blockpool.rows import ExtentRow
from agentmem.blockpool.vault import Vaults

Place = tuple[str, str]
Rank = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _File:
    """What rebuilding needs of an extent: its rows' tokens, packed ones first, and its size."""

    tokens: np.ndarray
    packed: int
    bytes: int


@dataclass(slots=True)
class Chain:
    """Pages along some tokens. `pages` and `extents` hold only what no chain before had; `head` is the last page of the chain."""

    pages: list[tuple[Page, tuple[Piece, ...]]]
    extents: list[ExtentRow]
    head: Page | None


class Chains:
    """Every page record of a folder of extents, by place (fingerprint and namespace) and parent.

    `bad`: {file name: why it is no extent}. `used`: names of extents that some chain lies in.
    """

    def __init__(self, folder: Path, vaults: Vaults | None = None) -> None:
        self._vaults = vaults
        self.bad: dict[str, str] = {}
        self.used: dict[str, ExtentRow] = {}
        self._files: dict[str, _File] = {}
        self._children: dict[Place, dict[str, list[tuple[Rank, str, dict[str, Any]]]]] = {}
        self._pages: dict[tuple[Place, bytes], Page] = {}
        for name in sorted(os.listdir(folder)):
            if name.endswith(SUFFIX):
                try:
                    self._take(folder / name)
                except (ExtentCorrupt, OSError, ValueError, TypeError, LookupError, AttributeError) as e:
                    self._files.pop(name, None)
                    self.bad[name] = f"{type(e).__name__}: {e}"
        for records in (r for by_parent in self._children.values() for r in by_parent.values()):
            records.sort(key=lambda entry: entry[0])
        self._names = list(self._files)
        self._numbers = {name: i + 1 for i, name in enumerate(self._names)}

    def _take(self, path: Path) -> None:
        extent = Extent(path, self._vaults)
        try:
            packed = extent.locate(False, 0)[1]
            self._files[path.name] = _File(extent.tokens, packed, os.fstat(extent.fd).st_size)
            place = (extent.meta["fingerprint"], extent.meta["namespace"])
            for record in extent.pages():
                known = self._children.setdefault(place, {}).setdefault(str(record["parent"]), [])
                known.append((_rank(record, len(extent.tokens)), path.name, record))
        finally:
            extent.close()

    @property
    def unused(self) -> list[str]:
        """Sound extents that no chain lies in."""
        return [name for name in self._files if name not in self.used]

    def fingerprints(self, namespace: str) -> list[str]:
        """Whose state of a namespace there is."""
        return [f for f, n in self._children if n == namespace]

    def along(self, fingerprint: str, namespace: str, ids: np.ndarray) -> Chain:
        """The chain of pages that covers most of `ids`. Tokens are compared themselves, keys only lead there."""
        place = (fingerprint, namespace)
        root = Page(None, np.zeros(0, np.int32), root_key(fingerprint, namespace), raw=False)
        best, open_ends, seen = root, [root], {root.key}
        while open_ends:
            page = open_ends.pop()
            if page.end > best.end:
                best = page
            for child in self._behind(place, page, ids[page.end :]):
                if child.key not in seen:
                    seen.add(child.key)
                    open_ends.append(child)
        chain = Chain([], [], best if best is not root else None)
        for page in best.chain():
            self._adopt(place, page, chain)
        return chain

    def _behind(self, place: Place, page: Page, ids: np.ndarray) -> Iterator[Page]:
        """Pages behind `page` whose tokens `ids` begins with, each with its rows' places by file name."""
        for _, name, record in self._children.get(place, {}).get(page.key.hex(), []):
            try:
                yield self._child(place, page, name, record, ids)
            except (KeyError, ValueError, TypeError, IndexError):
                continue

    def _child(self, place: Place, parent: Page, name: str, record: dict[str, Any], ids: np.ndarray) -> Page:
        known = self._pages.get((place, bytes.fromhex(record["key"])))
        if known is not None:
            if not np.array_equal(ids[: known.rows], known.tokens):
                raise ValueError("other tokens")
            return known
        at, parts, places = 0, [], []
        for where, raw, extent_row, page_row, rows in record["pieces"]:
            file = self._files[where or name]
            first = extent_row + (file.packed if raw else 0)
            if page_row != at or not 0 <= first < first + rows <= len(file.tokens):
                raise ValueError("rows that are not there")
            parts.append(file.tokens[first : first + rows])
            places.append((where or name, Piece(0, bool(raw), extent_row, page_row, rows)))
            at += rows
        tokens = np.concatenate(parts).astype(np.int32)
        if at != record["rows"] or not np.array_equal(ids[:at], tokens):
            raise ValueError("other tokens")
        key = page_key(parent.key, tokens)
        if key.hex() != record["key"]:
            raise ValueError("a key that does not belong to the tokens")
        page = Page(parent, tokens, key, bool(record["raw"]), start=parent.end)
        page.pieces = tuple(p._replace(extent=self._numbers[n]) for n, p in places)
        return page

    def _adopt(self, place: Place, page: Page, chain: Chain) -> None:
        """Give a page of the chain its id, unless a chain before did."""
        if page.id is not None:
            return
        page.id = len(self._pages) + 1
        self._pages[place, page.key] = page
        assert page.pieces is not None
        chain.pages.append((page, page.pieces))
        for piece in page.pieces:
            name = self._names[piece.extent - 1]
            if name not in self.used:
                self.used[name] = ExtentRow(piece.extent, name, self._files[name].bytes)
                chain.extents.append(self.used[name])


def _rank(record: dict[str, Any], rows: int) -> Rank:
    """Sorts records of one page; the one that a merge wrote comes before those it was made from.

    A merge writes pages packed, in one piece, and in an extent of more rows. An extent that it took a page from keeps its
    record of that page as long as other pages lie there.
    """
    pieces = record["pieces"]
    to_pack = 0 if record["raw"] else sum(bool(piece[1]) for piece in pieces)
    return to_pack, len(pieces), -rows
