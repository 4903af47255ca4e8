"""Siblings: the pages behind one left context, ordered by their token ids."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from agentmem.blockpool.page import Page

WORD = 4


def ordered(tokens: np.ndarray) -> bytes:
    """Token ids as bytes that sort as the ids do (big-endian int32)."""
    return tokens.astype(">i4").tobytes()


class Siblings:
    """A sorted list: what a lookup costs does not grow with the number of pages that begin alike.

    In sorted order the page that shares most tokens with a text stands next to the text's place.
    """

    __slots__ = ("_keys", "_lengths", "_pages")

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._pages: list[Page] = []
        self._lengths: dict[int, int] | None = None

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Page]:
        return iter(self._pages)

    @property
    def longest(self) -> int:
        """Rows of the longest page; 0 without pages."""
        return max(self._by_length(), default=0) // WORD

    def _by_length(self) -> dict[int, int]:
        """How many keys have which length; counted when it is first needed, since most pages have one child."""
        if self._lengths is None:
            self._lengths = dict(Counter(map(len, self._keys)))
        return self._lengths

    def add(self, page: Page) -> None:
        key = ordered(page.tokens)
        at = bisect_left(self._keys, key)
        self._keys.insert(at, key)
        self._pages.insert(at, page)
        if self._lengths is not None:
            self._lengths[len(key)] = self._lengths.get(len(key), 0) + 1

    def remove(self, page: Page) -> None:
        """Raises ValueError when `page` is not here."""
        key = ordered(page.tokens)
        at = self._pages.index(page, bisect_left(self._keys, key))
        del self._keys[at], self._pages[at]
        if self._lengths is not None:
            self._lengths[len(key)] -= 1
            if not self._lengths[len(key)]:
                del self._lengths[len(key)]

    def only(self, text: bytes, at: int) -> Page | None:
        """The one page that is here, when `text` goes on with all of its tokens at byte `at`."""
        return self._pages[0] if len(self._keys) == 1 and text.startswith(self._keys[0], at) else None

    def same(self, key: bytes) -> Iterator[Page]:
        """Pages with exactly these tokens (see `ordered`)."""
        at = bisect_left(self._keys, key)
        while at < len(self._keys) and self._keys[at] == key:
            yield self._pages[at]
            at += 1

    def prefixes(self, key: bytes) -> Iterator[Page]:
        """Pages all of whose tokens `key` begins with."""
        for length in self._by_length():
            if length <= len(key):
                yield from self.same(key[:length])

    def nearest(self, key: bytes) -> Iterator[tuple[int, Page]]:
        """(rows in common, page), most rows first; pages without a common row are left out."""
        after = bisect_left(self._keys, key)
        before = after - 1
        while True:
            left = _common(self._keys[before], key) if before >= 0 else 0
            right = _common(self._keys[after], key) if after < len(self._keys) else 0
            if not left and not right:
                return
            if left > right:
                yield left, self._pages[before]
                before -= 1
            else:
                yield right, self._pages[after]
                after += 1


class _Childless(Siblings):
    """What every page has until it gets its first child: most of what a large tree would take otherwise."""

    def add(self, page: Page) -> None:
        raise AssertionError("add to siblings of its own")


NO_CHILDREN = _Childless()


def _common(a: bytes, b: bytes) -> int:
    """Whole words that `a` and `b` begin with in common."""
    n = min(len(a), len(b)) // WORD * WORD
    differ = np.flatnonzero(np.frombuffer(a[:n], np.int32) != np.frombuffer(b[:n], np.int32))
    return int(differ[0]) if differ.size else n // WORD
