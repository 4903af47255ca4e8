"""Pages and the tree they form: which token ids, behind which left context, have state, and where it is.

The tree belongs to the engine thread. A page's tokens and its place in the tree never change; where its rows lie does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from agentmem.blockpool.siblings import NO_CHILDREN, Siblings, ordered

Tokens = np.ndarray

NEIGHBOURS = 16
"""Pages that begin like a text, of which one may be in RAM or stored at all."""


class Piece(NamedTuple):
    """Rows of a page on disk: rows [page_row, page_row + rows) lie at [extent_row, ...) of the extent's raw or packed rows."""

    extent: int
    raw: bool
    extent_row: int
    page_row: int
    rows: int


@dataclass(eq=False, slots=True)
class Page:
    """Up to `page_tokens` tokens behind a left context (`parent`).

    A page with `slots` is in RAM, one with `pieces` is on disk. A `volatile` one need not be: it may leave RAM unwritten.
    `last_used` is in seconds of the monotonic clock.
    """

    parent: Page | None
    tokens: Tokens
    key: bytes
    raw: bool
    start: int = 0
    id: int | None = None
    slots: tuple[int, ...] | None = None
    pieces: tuple[Piece, ...] | None = None
    origin: tuple[Page, int] | None = None
    pins: int = 0
    heads: int = 0
    volatile: bool = False
    last_used: float = 0.0
    children: Siblings = NO_CHILDREN

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def veiled(self) -> bool:
        """Whether its rows are no prefix's: its ids are inverted."""
        return int(self.tokens[0]) < 0

    @property
    def said(self) -> Tokens:
        """Its token ids as they were fed."""
        return veiled(self.tokens) if self.veiled else self.tokens

    @property
    def stored(self) -> bool:
        """Whether its rows are anywhere."""
        return self.slots is not None or self.pieces is not None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def chain(self) -> list[Page]:
        """Pages from the first to this one; the root is left out."""
        pages: list[Page] = []
        page: Page | None = self
        while page is not None and page.parent is not None:
            pages.append(page)
            page = page.parent
        return pages[::-1]

    def walk(self) -> Iterator[Page]:
        """Every page below this one, parents first."""
        stack = list(self.children)
        while stack:
            page = stack.pop()
            yield page
            stack.extend(page.children)


def bytes_by_extent(pages: Iterable[Page], row_bytes: Callable[[bool], int]) -> dict[int, int]:
    """Bytes of rows that `pages` have in each extent, in their order; repeated pages count repeatedly.

    `row_bytes`: of one row, raw or packed, see `Geometry.row_bytes`.
    """
    sizes: dict[int, int] = {}
    for piece in (x for p in pages for x in p.pieces or ()):
        sizes[piece.extent] = sizes.get(piece.extent, 0) + piece.rows * row_bytes(piece.raw)
    return sizes


def veiled(ids: Sequence[int] | Tokens) -> Tokens:
    """Token ids as pages have them whose rows are no prefix's, such as what was computed behind a shortened past: all inverted.

    No vocabulary has a negative id, so no prompt finds such a page; only who knows of it does. Its own inverse.
    """
    return np.invert(np.asarray(ids, dtype=np.int32))


def numbered(number: int, rows: int) -> Tokens:
    """Ids of a chain of `rows` rows that is reached by its `number` alone, not along tokens: all of them veiled."""
    ids = np.arange(rows)
    ids[:1] = number
    return veiled(ids)


def page_key(parent: bytes, tokens: Tokens) -> bytes:
    """SHA-256 over the parent's key and the page's token ids (little-endian int32)."""
    return hashlib.sha256(parent + np.asarray(tokens, dtype="<i4").tobytes()).digest()


def root_key(fingerprint: str, namespace: str) -> bytes:
    """The key that every chain of one fingerprint and namespace starts from."""
    return hashlib.sha256(json.dumps(["agentmem", fingerprint, namespace]).encode()).digest()


def common_prefix(a: Sequence[int] | Tokens, b: Sequence[int] | Tokens) -> int:
    """Length of the longest common prefix of two token sequences."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differ[0]) if differ.size else n


class Match(NamedTuple):
    """`pages` in order; all but the last are used whole, the last one's first `rows` rows. `tokens` in total."""

    pages: list[Page]
    rows: int
    tokens: int


class PageTree:
    """All pages of one fingerprint and namespace."""

    def __init__(self, fingerprint: str, namespace: str) -> None:
        self.namespace = namespace
        self.root = Page(None, np.zeros(0, np.int32), root_key(fingerprint, namespace), raw=False)

    def add(self, parent: Page, tokens: Tokens, *, raw: bool) -> Page:
        """A new page behind `parent`."""
        tokens = np.asarray(tokens, dtype=np.int32)
        assert len(tokens) > 0
        page = Page(parent, tokens, page_key(parent.key, tokens), raw, start=parent.end)
        if parent.children is NO_CHILDREN:
            parent.children = Siblings()
        parent.children.add(page)
        return page

    def remove(self, page: Page) -> None:
        """Take a page without children out of the tree. Precondition: it holds no slots and nothing pins it."""
        assert not page.children
        assert page.slots is None
        assert page.pins == 0
        assert page.parent is not None
        page.parent.children.remove(page)

    def match(self, ids: Sequence[int] | Tokens) -> Match:
        """The longest prefix of `ids` that has state. Token ids are compared themselves; equal lengths prefer RAM.

        All branches are followed: a short page may lead further than a long one beside it.
        """
        text = ordered(np.asarray(ids, dtype=np.int32))
        best, score, open_ends = Match([], 0, 0), (0, False), [self.root]
        while open_ends:
            page = _straight_on(open_ends.pop(), text)
            if (page.end, page.slots is not None) > score:
                score, best = (page.end, page.slots is not None), Match([page], page.rows, page.end)
            for rows, child in _continuations(page, text):
                if (page.end + rows, child.slots is not None) > score:
                    score = page.end + rows, child.slots is not None
                    best = Match([child], rows, page.end + rows)
                if rows == child.rows:
                    open_ends.append(child)
        return best._replace(pages=best.pages[-1].chain()) if best.pages else best

    def pages(self) -> Iterator[Page]:
        return self.root.walk()


def _straight_on(page: Page, text: bytes) -> Page:
    """The page that one comes to by single children that `text` goes on with."""
    at = 4 * page.end
    while (child := page.children.only(text, at)) is not None and child.stored:
        page = child
        at += page.tokens.nbytes
    return page


def _continuations(page: Page, text: bytes) -> Iterator[tuple[int, Page]]:
    """(rows, child) of the children that go on as `text` does behind `page`: those used whole, and the best of the others."""
    longest = page.children.longest
    rest = text[4 * page.end : 4 * (page.end + longest)]
    whole = [(c.rows, c) for c in page.children.prefixes(rest) if c.stored]
    yield from whole
    if not rest or any(rows == longest for rows, _ in whole):
        return
    near = [(rows, c) for rows, c in islice(page.children.nearest(rest), NEIGHBOURS) if c.stored]
    yield from near[:1]
    yield from ((rows, c) for rows, c in near[1:] if c.slots is not None and rows == near[0][0])


def match_chain(head: Page, ids: Sequence[int] | Tokens, *, veils: bool = False) -> Match:
    """How much of `ids` the chain that ends in `head` covers; up to its first veiled page unless `veils` count too."""
    wanted = np.asarray(ids, dtype=np.int32)
    text, veiled_text = wanted.tobytes(), veiled(wanted).tobytes() if veils else b""
    pages: list[Page] = []
    at, rows = 0, 0
    for page in head.chain():
        if not page.stored or (page.veiled and not veils):
            break
        whole = (veiled_text if page.veiled else text).startswith(page.tokens.tobytes(), 4 * at)
        n = page.rows if whole else common_prefix(page.said, wanted[at:])
        if n == 0:
            break
        pages.append(page)
        at, rows = at + n, n
        if n < page.rows:
            break
    return Match(pages, rows, at)
