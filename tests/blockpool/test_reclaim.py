"""Which pages leave the disk first."""

from __future__ import annotations

import numpy as np
import pytest

from agentmem.blockpool.page import Page, PageTree, Piece
from agentmem.blockpool.reclaim import Reclaim, worth

HOUR = 3600.0


def chain(tree: PageTree, pages: int, first_extent: int, last_used: float, per_extent: int = 1) -> list[Page]:
    """A chain of pages, `per_extent` of them in each extent."""
    out, parent = [], tree.root
    for i in range(pages):
        page = tree.add(parent, np.array([first_extent, i, 7, 8]), raw=i == 0)
        page.pieces = (Piece(first_extent + i // per_extent, page.raw, 0, 0, 4),)
        page.last_used = last_used
        out.append(page)
        parent = page
    return out


def reclaim(tree: PageTree, kept: set[Page] | None = None) -> Reclaim:
    return Reclaim(
        tree.pages(),
        kept=kept or set(),
        row_bytes=lambda raw: 36 if raw else 10,
        half_life=HOUR,
        now=10 * HOUR,
    )


def test_worth_halves_with_every_half_life() -> None:
    assert worth(2.0, 4, 0.0, HOUR) == 0.5
    assert worth(2.0, 4, 2 * HOUR, HOUR) == pytest.approx(0.125)
    assert worth(2.0, 4, -5.0, HOUR) == 0.5


def test_the_oldest_chain_goes_first_and_from_its_end() -> None:
    tree = PageTree("f", "n")
    old, new = chain(tree, 4, 10, 1 * HOUR), chain(tree, 4, 20, 9 * HOUR)
    pages, size = reclaim(tree).until(25, lambda _: 10)
    assert (set(pages), size) == (set(old[1:]), 30)
    pages, size = reclaim(tree).until(45, lambda _: 10)
    assert (set(pages), size) == ({*old, new[3]}, 50)


def test_recent_short_pages_outlive_old_dense_ones() -> None:
    """A 16-bit first page saves less per byte than a packed one, but it stays as long as pages need it."""
    tree = PageTree("f", "n")
    only, long = chain(tree, 1, 10, 9 * HOUR), chain(tree, 2, 20, 9 * HOUR)
    assert reclaim(tree).until(1, lambda _: 10)[0] == only
    assert set(reclaim(tree).until(11, lambda _: 10)[0]) == {*only, long[1]}


def test_kept_and_pinned_pages_stay_with_everything_in_front() -> None:
    tree = PageTree("f", "n")
    a, b, c = chain(tree, 3, 10, 0.0), chain(tree, 3, 20, 0.0), chain(tree, 3, 30, 9 * HOUR)
    b[1].pins = 1
    pages, size = reclaim(tree, {a[2]}).until(1000, lambda _: 10)
    assert set(pages) == {b[2], *c}
    assert size == 40


def test_pages_that_free_no_file_are_not_dropped() -> None:
    """Two agents share an extent's first pages: dropping one branch's end frees only its own extent."""
    tree = PageTree("f", "n")
    trunk = chain(tree, 4, 10, 0.0, per_extent=4)
    branch = tree.add(trunk[1], np.array([99, 1]), raw=False)
    branch.pieces, branch.last_used = (Piece(50, False, 0, 0, 2),), 9 * HOUR
    pages, size = reclaim(tree).until(10, lambda _: 10)
    assert (pages, size) == ([branch], 10)
    pages, size = reclaim(tree).until(11, lambda _: 10)
    assert (set(pages), size) == ({*trunk, branch}, 20)


def test_a_page_in_two_extents_counts_for_both() -> None:
    tree = PageTree("f", "n")
    first, second = chain(tree, 2, 10, 0.0)
    second.pieces = (Piece(10, True, 1, 0, 2), Piece(11, False, 0, 2, 2))
    pages, size = reclaim(tree).until(10, lambda e: {10: 100, 11: 10}[e])
    assert (pages, size) == ([second], 10)
    assert set(reclaim(tree).until(11, lambda e: {10: 100, 11: 10}[e])[0]) == {first, second}
