"""Routing: a question goes to the topic of the segment that is nearest in meaning and in words together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentmem.episode.routing import WORDS, question_text, route
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


NOTHING = np.zeros(7)
"""No word of the question was said, in any of seven segments."""


def test_the_nearest_segment_decides_where_no_word_was_said() -> None:
    rows, topics = two_topics()
    query = unit(E1, 0.1 * E2)
    found = route(query, NOTHING, rows, topics, titles={7: "the garden plan"})
    assert found.topic == 7
    assert found.scores == pytest.approx({3: rows[1] @ query, 7: rows[4] @ query})
    assert found.similarity == pytest.approx(query @ unit(topics[1].centroid))
    near = rows[4] @ query
    why = f"a segment of similarity {near:.2f} with 0% of the words"
    assert found.reason == f"episode 7 ('the garden plan'): {why}"


def test_one_segment_wins_over_the_centroid() -> None:
    # The first topic's centroid is nearer, but the best segment is of the second.
    rows = np.stack([unit(E0, 0.6 * E1), unit(E0, -0.6 * E1), E0, -E1, -E1])
    topics = [topic_of(0, rows, [0, 1]), topic_of(1, rows, [2, 3, 4])]
    found = route(E0, np.zeros(5), rows, topics)
    assert found.topic == 1
    assert found.similarity < float(E0 @ unit(topics[0].centroid))


def test_words_win_over_a_segment_that_is_hardly_nearer() -> None:
    rows, topics = two_topics()
    query = unit(E0, 1.1 * E1)
    said = NOTHING.copy()
    assert route(query, said, rows, topics).topic == 7
    said[2] = 0.5
    found = route(query, said, rows, topics)
    assert found.topic == 3
    assert "with 50% of the words" in found.reason


def test_of_two_equal_segments_the_one_of_the_nearer_centroid_counts() -> None:
    rows = np.stack([E0, E2, E0, unit(E0, E2)])
    topics = [topic_of(0, rows, [0, 1]), topic_of(1, rows, [2, 3])]
    assert route(E0, np.zeros(4), rows, topics).topic == 1


def test_the_active_episode_stays_where_the_other_is_hardly_better() -> None:
    rows, topics = two_topics()
    between = unit(E0, 1.1 * E1)
    free = route(between, NOTHING, rows, topics)
    apart = free.scores[7] - free.scores[3]
    assert free.topic == 7
    assert apart > 0.02
    kept = route(between, NOTHING, rows, topics, active=3, margin=2 * apart)
    assert kept.topic == 3
    assert kept.reason.startswith("episode 3: stays; episode 7 has a segment of similarity")
    assert route(between, NOTHING, rows, topics, active=3, margin=apart / 2).topic == 7
    assert route(between, NOTHING, rows, topics, active=3).topic == 7


def test_below_the_floor_the_most_recent_episode_stays() -> None:
    rows, topics = two_topics()
    query = unit(E2, 0.1 * E0)
    assert route(query, NOTHING, rows, topics, active=3, floor=0.5).topic == 3
    none = route(query, NOTHING, rows, topics, floor=0.5)
    assert none.topic == 7  # spoke last
    assert "nothing is similar enough" in none.reason
    assert route(query, NOTHING, rows, topics, active=99, floor=0.5).topic == 7


def test_words_count_below_the_floor_where_half_of_them_were_said() -> None:
    rows, topics = two_topics()
    query = unit(-1 * E2, 0.1 * E1)
    said = NOTHING.copy()
    for share, expected in ((0.49, 7), (0.5, 3)):
        said[0] = share
        assert route(query, said, rows, topics, active=7, floor=0.9).topic == expected


def test_without_topics_there_is_no_episode() -> None:
    found = route(E0, np.zeros(0), np.zeros((0, 3)), [])
    assert (found.topic, found.scores) == (None, {})


def test_pending_segments_choose_none() -> None:
    rows = np.stack([E0, unit(E0, E1), E1, E1])
    topics = [topic_of(0, rows, [0]), topic_of(1, rows, [1])]
    query, said = unit(E0, -0.1 * E1), np.array([0, 0, 1.0, 1.0])
    found = route(query, said, rows, topics, floor=1.0, active=1)
    assert found.topic == 1  # only pending ones have the words, so nothing is known
    assert route(query, said, rows, topics, floor=0.0).topic == 0


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
    said = rng.integers(0, 3, segments) / 2
    found = route(query, said, rows, topics, active)
    assert found == route(query, said, rows, topics[::-1], active)
    free = route(query, said, rows, topics, floor=-1.0)
    each = rows @ query + WORDS * said
    assert free.scores == pytest.approx({t: each[owner == t].max() for t in np.unique(owner)}, abs=1e-6)
    assert free.topic is not None
    assert free.scores[free.topic] == pytest.approx(each.max(), abs=1e-6)
    if active in owner and each.max() - each[owner == active].max() < 0.019:
        assert found.topic == active
