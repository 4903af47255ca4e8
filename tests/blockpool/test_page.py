"""Pages: tokens decide what matches, at token granularity; the key is only a hint."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.blockpool.page import Page, PageTree, Piece, common_prefix, match_chain, page_key, root_key

HELD = (0,)


def grow(tree: PageTree, *pages: list[int], on_disk: bool = False) -> Page:
    """A chain of pages with state; returns the last one."""
    page = tree.root
    for tokens in pages:
        page = tree.add(page, np.array(tokens), raw=False)
        if on_disk:
            page.pieces = (Piece(1, False, 0, 0, len(tokens)),)
        else:
            page.slots = HELD
    return page


@pytest.fixture
def tree() -> PageTree:
    return PageTree("fingerprint", "default")


def test_match_stops_at_the_token_that_differs(tree: PageTree) -> None:
    grow(tree, [1, 2, 3, 4], [5, 6, 7, 8])
    for ids, tokens, pages, rows in [
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, 2, 4),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 8, 2, 4),
        ([1, 2, 3, 4, 5, 6, 9, 8], 6, 2, 2),
        ([1, 2, 3, 4, 9], 4, 1, 4),
        ([1, 2, 9, 4, 5], 2, 1, 2),
        ([1], 1, 1, 1),
        ([9, 1, 2], 0, 0, 0),
        ([], 0, 0, 0),
    ]:
        match = tree.match(ids)
        assert (match.tokens, len(match.pages), match.rows) == (tokens, pages, rows), ids


def test_match_prefers_the_longest_of_several_branches(tree: PageTree) -> None:
    grow(tree, [1, 2, 3], [4, 5])
    longer = grow(tree, [1, 2, 3, 4], [5, 6, 7])
    match = tree.match([1, 2, 3, 4, 5, 6, 8])
    assert match.tokens == 6
    assert match.pages[-1] is longer


def test_a_short_page_that_leads_further_wins(tree: PageTree) -> None:
    """What an edited history leaves: the old page, and the same page cut short with new rows behind it."""
    grow(tree, [1, 2, 3, 4], [5, 6, 7, 8])
    head = grow(tree, [1, 2], [9, 9], [7])
    assert tree.match([1, 2, 9, 9, 7]) == (head.chain(), 1, 5)
    grow(tree, [1, 2, 9])
    assert tree.match([1, 2, 9, 9, 7]).tokens == 5
    assert tree.match([1, 2, 3, 4, 5, 7]).tokens == 5


def test_equal_matches_prefer_ram(tree: PageTree) -> None:
    grow(tree, [1, 2, 3], on_disk=True)
    hot = grow(tree, [1, 2, 9])
    assert tree.match([1, 2, 4]).pages == [hot]


def test_a_page_without_state_ends_the_match(tree: PageTree) -> None:
    last = grow(tree, [1, 2], [3, 4], [5, 6])
    middle = last.parent
    assert middle is not None
    middle.slots = None
    assert tree.match([1, 2, 3, 4, 5, 6]).tokens == 2
    assert match_chain(last, [1, 2, 3, 4, 5, 6]).tokens == 2
    middle.pieces = (Piece(1, False, 0, 0, 2),)
    assert tree.match([1, 2, 3, 4, 5, 6]).tokens == 6


def test_the_key_is_a_hint_and_tokens_are_the_truth(tree: PageTree) -> None:
    """Two pages whose keys collide are still two pages."""
    a = grow(tree, [1, 2, 3, 4])
    b = grow(tree, [1, 2, 7, 8])
    b.key = a.key
    assert tree.match([1, 2, 7, 8]).pages == [b]
    assert tree.match([1, 2, 3, 4]).pages == [a]
    assert tree.match([1, 2, 5, 5]).tokens == 2
    same = tree.add(a, np.array([1]), raw=False)
    assert page_key(a.key, np.array([1])) == same.key


def test_keys_differ_by_tokens_context_fingerprint_and_namespace(tree: PageTree) -> None:
    keys = {
        root_key("a", "b"),
        root_key("ab", ""),
        root_key("a", "c"),
        root_key("b", "b"),
        page_key(root_key("a", "b"), np.array([1, 2])),
        page_key(root_key("a", "c"), np.array([1, 2])),
        page_key(root_key("a", "b"), np.array([1, 3])),
        page_key(page_key(root_key("a", "b"), np.array([1])), np.array([2])),
    }
    assert len(keys) == 8
    assert page_key(b"p", np.array([1, 2], np.int64)) == page_key(b"p", np.array([1, 2], np.int32))


def test_match_chain_follows_one_chain_only(tree: PageTree) -> None:
    head = grow(tree, [1, 2], [3, 4])
    grow(tree, [1, 2, 3, 4, 5, 6])
    assert match_chain(head, [1, 2, 3, 4, 5, 6]).tokens == 4
    assert tree.match([1, 2, 3, 4, 5, 6]).tokens == 6
    assert match_chain(head, [1, 2, 3, 9]) == ([head.parent, head], 1, 3)
    assert match_chain(head, [7]) == ([], 0, 0)


def test_removed_pages_are_not_found(tree: PageTree) -> None:
    head = grow(tree, [1, 2], [3, 4])
    other = grow(tree, [1, 5])
    head.slots = None
    tree.remove(head)
    assert tree.match([1, 2, 3, 4]).tokens == 2
    assert head not in list(tree.pages())
    assert other in list(tree.pages())
    with pytest.raises(AssertionError):
        tree.remove(other)


def test_starts_and_ends_count_tokens(tree: PageTree) -> None:
    head = grow(tree, [1, 2, 3], [4], [5, 6])
    assert [(p.start, p.end, p.rows) for p in head.chain()] == [(0, 3, 3), (3, 4, 1), (4, 6, 2)]


@given(
    chains=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6),
    ids=st.lists(st.integers(0, 2), max_size=10),
    page=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_a_match_is_the_longest_prefix_that_any_chain_holds(
    chains: list[list[int]], ids: list[int], page: int
) -> None:
    tree = PageTree("f", "n")
    heads = []
    for chain in chains:
        heads.append(grow(tree, *[chain[i : i + page] for i in range(0, len(chain), page)]))
    match = tree.match(ids)
    matched = [t for p in match.pages[:-1] for t in p.tokens]
    if match.pages:
        matched += list(match.pages[-1].tokens[: match.rows])
    assert matched == ids[: match.tokens]
    assert [p.parent for p in match.pages] == [tree.root, *match.pages[:-1]][: len(match.pages)]
    assert match.tokens == max(common_prefix(c, ids) for c in chains)
    for head, chain in zip(heads, chains, strict=True):
        assert match_chain(head, ids).tokens == common_prefix(chain, ids)
