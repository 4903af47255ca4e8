"""The pool of anchors: what it keeps, what it lets go, and what it lends."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.compose.anchors import PAPER_WINDOW, Eviction, Pool
from agentmem.compose.offsets import Gram, Kriging, traits
from agentmem.compose.packed import Samples
from agentmem.compose.state import State
from tests.compose.test_offsets import drawn

ROOM = 1 << 30


def name(number: int) -> bytes:
    return number.to_bytes(4, "big")


def put(pool: Pool, number: int, *, slot: str = "question", tokens: int = 6, consumer: str = "judge") -> None:
    base = drawn(tokens, number)
    pool.observe(slot, name(number), base, consumer, drawn(tokens, number + 1), drawn(3, number + 2))


def test_an_anchor_is_what_was_observed() -> None:
    for eviction, base, share in (
        (Eviction.DECAYED, traits(drawn(6, 4)), 0.12),
        (Eviction.PAPER, drawn(6, 4), 0.2),
    ):
        pool = Pool(ROOM, eviction=eviction)
        put(pool, 4)
        (anchor,) = pool.eligible("question", "judge", 6)
        seen = anchor.observed("judge")
        assert 0 < _lost(seen.base, base) < 0.01
        assert 0 < _lost(seen.slot, drawn(6, 5)) < 0.4
        assert 0 < _lost(seen.after, drawn(3, 6)) < 0.4
        whole = sum(s.nbytes for s in (drawn(6, 4), drawn(6, 5), drawn(3, 6)))
        assert anchor.nbytes == pool.nbytes == pool.anchor_bytes < share * whole


def test_what_is_kept_beside_anchors_is_within_the_budget_and_goes_first() -> None:
    pool, kriging = Pool(ROOM), Kriging()

    def gram() -> Gram:
        anchors = pool.of_slot("question")
        return pool.gram("question", anchors, kriging)

    put(pool, 1, tokens=40)
    one = pool.anchor_bytes
    first = gram()
    assert gram() is first
    assert pool.nbytes == one + first.nbytes
    put(pool, 2, tokens=40)
    second = gram()
    assert second.texts == (name(1), name(2))
    assert gram() is second
    pool.budget = 3 * one + second.nbytes // 2
    put(pool, 3, tokens=40)
    assert len(pool) == 3
    assert pool.nbytes == pool.anchor_bytes
    assert gram() is not gram(), "there is no room for it"
    assert pool.nbytes <= pool.budget


def test_offsets_side_by_side_are_kept_until_they_are_other_ones() -> None:
    pool = Pool(ROOM)

    def samples(at: list[np.ndarray] | None = None) -> Samples:
        offsets = [a.offsets["judge"][0] for a in pool.of_slot("question")]
        return pool.samples("question", "judge", offsets, at)

    put(pool, 1, tokens=40)
    one = pool.anchor_bytes
    first = samples()
    assert samples() is first
    assert pool.nbytes == one + first.nbytes
    some = samples([np.arange(3)])
    assert len(some) == 3
    assert samples([np.arange(3)]) is some
    assert samples() is first
    put(pool, 1, tokens=40)
    assert pool.nbytes == one, "another offset was observed"
    assert samples() is not first
    put(pool, 2, tokens=40)
    assert len(samples()) == 80
    pool.drop("question", name(2))
    assert pool.nbytes == pool.anchor_bytes == one
    pool.budget = one
    assert samples() is not samples(), "there is no room for it"


def _lost(got: State, want: State) -> float:
    """What is lost of a state, in parts of its length."""
    return (mx.linalg.norm(got.rows - want.rows) / mx.linalg.norm(want.rows)).item()


def test_an_anchor_that_is_shorter_than_the_text_is_not_used() -> None:
    """Invariant 12."""
    pool = Pool(ROOM)
    for tokens in (3, 6, 9):
        put(pool, tokens, tokens=tokens)
    assert [len(a) for a in pool.eligible("question", "judge", 6)] == [6, 9]
    assert pool.eligible("question", "judge", 10) == []
    assert pool.eligible("question", "another", 1) == []
    assert pool.eligible("answer", "judge", 1) == []


def test_one_anchor_serves_every_consumer_that_was_seen_with_it() -> None:
    pool = Pool(ROOM)
    put(pool, 1, consumer="judge")
    put(pool, 1, consumer="critic")
    assert len(pool) == 1
    assert pool.eligible("question", "judge", 6) == pool.eligible("question", "critic", 6)


def test_an_anchor_moves_to_another_pool_and_leaves_it() -> None:
    pool, other = Pool(ROOM), Pool(ROOM)
    for number in (1, 2, 3):
        put(pool, number, slot="ab"[number % 2])
    for slot, anchor in pool.items():
        other.add(slot, anchor)
    assert list(other.items()) == list(pool.items())
    other.drop("b", name(1))
    other.drop("a")
    other.drop("c", name(1))
    assert [(slot, anchor.text) for slot, anchor in other.items()] == [("b", name(3))]
    small = Pool(pool.of_slot("a")[0].nbytes - 1)
    small.add("a", pool.of_slot("a")[0])
    assert len(small) == 0


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.integers(1, 40), st.booleans()), max_size=40
    )
)
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("eviction", list(Eviction))
def test_caps_hold_always(eviction: Eviction, events: list[tuple[str, int, int, bool]]) -> None:
    """Invariant 14."""
    each = Pool(ROOM)
    put(each, 1, tokens=40)
    pool = Pool(3 * each.nbytes, per_slot=4, eviction=eviction)
    for slot, number, tokens, used in events:
        put(pool, number, slot=slot, tokens=tokens)
        assert len(pool.of_slot(slot)) <= 4
        assert pool.nbytes <= pool.budget
        if used:
            pool.count(pool.of_slot(slot)[:1])


def test_what_served_least_goes_first() -> None:
    pool = Pool(ROOM, per_slot=3)
    for number in (1, 2, 3):
        put(pool, number)
    pool.count([a for a in pool.of_slot("question") if a.text != name(2)])
    put(pool, 4)
    assert [a.text for a in pool.of_slot("question")] == [name(1), name(3), name(4)]


def test_what_served_long_ago_counts_less() -> None:
    pool = Pool(ROOM, per_slot=2, half_life=2)
    put(pool, 1)
    put(pool, 2)
    first, second = pool.of_slot("question")
    pool.count([first])
    pool.count([first])
    for _ in range(10):
        pool.count([])
    pool.count([second])
    put(pool, 3)
    assert pool.of_slot("question")[0] is second


def test_the_papers_eviction_looks_at_the_oldest_only() -> None:
    pool = Pool(ROOM, per_slot=PAPER_WINDOW + 3, eviction=Eviction.PAPER)
    for number in range(PAPER_WINDOW + 3):
        put(pool, number)
    anchors = pool.of_slot("question")
    pool.count(anchors[:3])
    pool.count(anchors[4:PAPER_WINDOW])
    put(pool, 99)
    assert anchors[3] not in pool.of_slot("question"), "the one of the oldest that never served"
    pool.count(pool.of_slot("question")[:PAPER_WINDOW])
    put(pool, 100)
    assert anchors[4] in pool.of_slot("question")


def test_an_anchor_in_use_stays() -> None:
    pool = Pool(ROOM, per_slot=2)
    put(pool, 1)
    put(pool, 2)
    first, second = pool.of_slot("question")
    first.users = 1
    put(pool, 3)
    assert first in pool.of_slot("question")
    assert second not in pool.of_slot("question")
