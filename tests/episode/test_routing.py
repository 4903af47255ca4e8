"""Routing: a question goes to the topic of most of the nearest segments."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentmem.episode.routing import question_text, route
from agentmem.episode.topic import Topic, topic_of

E0, E1, E2 = np.eye(3)


def unit(*parts: NDArray[np.float64]) -> NDArray[np.float64]:
    whole = np.sum(parts, axis=0)
    return whole / np.linalg.norm(whole)


def two_topics() -> tuple[NDArray[np.float64], list[Topic]]:
    """Segments 0 to 3 around the first axis, 4 to 6 around the second."""
    rows = np.stack(
        [E0, unit(E0, 0.2 * E1), unit(E0, 0.1 * E2), E0, E1, unit(E1, 0.2 * E0), unit(E1, 0.3 * E2)]
    )
    return rows, [topic_of(3, rows, range(4)), topic_of(7, rows, range(4, 7))]


def test_most_of_the_nearest_segments_decide() -> None:
    rows, topics = two_topics()
    found = route(unit(E1, 0.1 * E2), rows, topics, titles={7: "the garden plan"})
    assert (found.topic, found.votes) == (7, {7: 3})
    assert (
        found.reason
        == f"episode 7 ('the garden plan'): 3 of 3 nearest segments, similarity {found.similarity:.2f}"
    )
    assert route(E0, rows, topics).votes == {3: 3}


def test_votes_win_over_the_centroid() -> None:
    # The first topic's centroid is nearer, but two of its segments are far away.
    rows = np.stack([E0, E2, unit(E0, 0.5 * E1), unit(E0, 0.5 * E1), -E1, -E1, -E1])
    topics = [topic_of(0, rows, [0, 1]), topic_of(1, rows, range(2, 7))]
    query = unit(E0, 0.3 * E1)
    found = route(query, rows, topics, floor=-1)
    assert (found.topic, found.votes) == (1, {1: 2, 0: 1})
    assert found.similarity < float(query @ unit(topics[0].centroid))


def test_the_nearer_centroid_decides_between_equals() -> None:
    rows = np.stack([E0, E1, unit(E0, E1, E2)])
    topics = [topic_of(n, rows, [n]) for n in range(3)]
    found = route(unit(0.4 * E0, 0.8 * E1, 0.1 * E2), rows, topics)
    assert found.votes == {0: 1, 1: 1, 2: 1}
    assert found.topic == 1


def test_the_active_episode_stays_where_the_other_is_hardly_nearer() -> None:
    rows, topics = two_topics()
    between = unit(E0, 1.1 * E1)
    free = route(between, rows, topics)
    assert (free.topic, free.votes) == (7, {7: 2, 3: 1})
    kept = route(between, rows, topics, active=3, margin=0.2)
    assert kept.topic == 3
    assert kept.reason.startswith("episode 3: stays; episode 7 has 2 of 3 nearest segments")
    assert route(between, rows, topics, active=3, margin=0.0).topic == 7
    assert route(E1, rows, topics, active=3, margin=5.0).topic == 7  # the active one has no vote


def test_below_the_floor_the_most_recent_episode_stays() -> None:
    rows, topics = two_topics()
    query = unit(E2, 0.1 * E0)
    assert route(query, rows, topics, active=3, floor=0.5).topic == 3
    none = route(query, rows, topics, floor=0.5)
    assert none.topic == 7  # spoke last
    assert "nothing is similar enough" in none.reason
    assert route(query, rows, topics, active=99, floor=0.5).topic == 7


def test_without_topics_there_is_no_episode() -> None:
    found = route(E0, np.zeros((0, 3)), [])
    assert (found.topic, found.votes) == (None, {})


def test_pending_segments_have_no_vote() -> None:
    rows = np.stack([E0, E1, E1, E1])
    assert route(unit(E1, 0.2 * E0), rows, [topic_of(0, rows, [0])], floor=0.0).votes == {0: 1}


def test_a_short_question_brings_the_one_before() -> None:
    assert question_text("And what about hers?", "When did Ann sell the boat?") == (
        "When did Ann sell the boat?\nAnd what about hers?"
    )
    long = "Which colour did Ann paint the kitchen door last summer?"
    assert question_text(long, "before") == long
    assert question_text("And hers?") == "And hers?"


@given(seed=st.integers(0, 10_000), segments=st.integers(1, 12), parts=st.integers(1, 4))
def test_routing_is_deterministic_and_minds_no_order_of_topics(seed: int, segments: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(segments, 3)).round(1) + 0.01  # with equals
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    owner = rng.integers(0, parts, segments)
    topics = [topic_of(int(t), rows, np.flatnonzero(owner == t).tolist()) for t in np.unique(owner)]
    query, active = unit(rng.normal(size=3)), int(rng.integers(0, 5))
    found = route(query, rows, topics, active)
    assert found == route(query, rows, topics[::-1], active)
    assert found.topic in {t.id for t in topics}
    assert sum(found.votes.values()) == min(3, segments)
