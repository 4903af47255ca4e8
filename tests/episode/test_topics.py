"""Topics: clusters of segments, kept while the conversation goes on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentmem.episode.segment import Segment
from agentmem.episode.titles import titles
from agentmem.episode.topic import cosines, episodes_for
from agentmem.episode.topics import Growth, Topics, cluster

pytestmark = pytest.mark.slow  # scikit-learn takes seconds to come

DIMS = 12


def near(axis: int, count: int, seed: int = 0, spread: float = 0.1) -> NDArray[np.float32]:
    """Unit rows around one axis: `count` segments that are about the same."""
    rows = np.random.default_rng([seed, axis]).normal(size=(count, DIMS)) * spread
    rows[:, axis] += 1
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def grown(*parts: NDArray[np.float32], growth: Growth | None = None) -> Topics:
    topics = Topics(DIMS, growth)
    for row in np.concatenate(parts):
        topics.assign(row)
    return topics


def same(one: Topics, other: Topics) -> bool:
    """Whether nothing that is kept differs by a bit."""
    (a, facts), (b, others) = one.state(), other.state()
    arrays = all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a | b)
    return arrays and facts == others


def test_how_many_episodes_a_conversation_has() -> None:
    assert [episodes_for(k) for k in (1, 79, 100, 160, 10_000)] == [2, 2, 2, 4, 8]


def test_clusters_are_what_belongs_together() -> None:
    rows = np.concatenate([near(0, 5), near(1, 7), near(0, 4, seed=1), near(2, 3)])
    topics = cluster(rows, 3)
    assert [t.members for t in topics] == [[0, 1, 2, 3, 4, 12, 13, 14, 15], [*range(5, 12)], [16, 17, 18]]
    for topic in topics:
        np.testing.assert_allclose(topic.centroid, rows[topic.members].mean(axis=0), atol=1e-6)
    # Eight stand for the first one: all but the least central, in the order of the conversation.
    first = topics[0]
    likeness = cosines(rows[first.members], first.centroid)
    dropped = first.members[int(likeness.argmin())]
    assert first.representatives == [m for m in first.members if m != dropped]
    np.testing.assert_allclose(first.similarities, cosines(rows[first.representatives], first.centroid))


def test_never_more_topics_than_different_segments() -> None:
    assert cluster(np.zeros((0, DIMS)), 4) == []
    assert [t.members for t in cluster(np.concatenate([near(0, 1)] * 5), 4)] == [[0, 1, 2, 3, 4]]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 30), episodes=st.integers(1, 8))
def test_clusters_partition_the_segments_the_same_way_every_time(
    seed: int, count: int, episodes: int
) -> None:
    rows = near(0, count, seed, spread=1.0)
    topics = cluster(rows, episodes)
    assert sorted(m for t in topics for m in t.members) == list(range(count))
    assert 1 <= len(topics) <= episodes
    again = cluster(rows, episodes)
    assert [(t.id, t.members, t.representatives) for t in topics] == [
        (t.id, t.members, t.representatives) for t in again
    ]
    for topic in topics:
        assert set(topic.representatives) <= set(topic.members)
        assert topic.representatives == sorted(topic.representatives)
        assert len(topic.representatives) == min(8, len(topic))


def test_segments_wait_until_enough_of_them_are_alike() -> None:
    topics = grown(near(0, 7), near(1, 3))
    assert (topics.topics, topics.pending) == ([], list(range(10)))
    opened = topics.assign(near(0, 1, seed=5)[0])
    assert (opened.topic, opened.opened, opened.merged) == (0, True, None)
    assert topics.topics[0].members == [*range(7), 10]
    assert topics.pending == [7, 8, 9]
    assert topics.assign(near(0, 1, seed=6)[0]) == (11, 0, False, None)
    assert topics.assign(near(1, 1, seed=6)[0]) == (12, None, False, None)


def test_a_centroid_is_the_running_mean() -> None:
    rows = near(0, 20)
    (topic,) = grown(rows).topics
    np.testing.assert_allclose(topic.centroid, rows.mean(axis=0), atol=1e-6)
    assert topic.representatives == cluster(rows, 1)[0].representatives


def test_unlike_segments_are_no_topic_however_many() -> None:
    topics = grown(np.eye(DIMS, dtype=np.float32))
    assert (topics.topics, len(topics.pending)) == ([], DIMS)


def test_one_too_many_makes_the_closest_two_one() -> None:
    tilted = near(0, 8, seed=3) + 0.9 * near(3, 8, seed=3)
    tilted /= np.linalg.norm(tilted, axis=1, keepdims=True)
    growth = Growth(apart=0.9, most=3)
    topics = grown(near(0, 8), near(1, 8), tilted, growth=growth)
    for number in range(3):
        topics.built(number)
        topics.hit(number)
    for row in near(2, 7):
        assert topics.assign(row).topic is None
    last = topics.assign(near(2, 8)[-1])
    assert last == (31, 3, True, (2, 0))
    assert [(t.id, len(t)) for t in topics.topics] == [(0, 16), (1, 8), (3, 8)]
    assert topics.hits == {0: 2, 1: 1}
    assert [topics.stale(n) for n in (0, 1, 3)] == [True, False, True]


def test_a_topic_that_is_merged_at_once_says_where_its_segments_went() -> None:
    topics = grown(near(0, 8), growth=Growth(apart=0.9, most=1))
    tilted = near(0, 8, seed=3) + 0.9 * near(3, 8, seed=3)
    tilted /= np.linalg.norm(tilted, axis=1, keepdims=True)
    went = [topics.assign(row) for row in tilted]
    assert went[-1] == (15, 0, False, (1, 0))


def test_a_topic_is_stale_when_others_stand_for_it_or_it_moved() -> None:
    topics = grown(near(0, 20, spread=0.3))
    assert topics.stale(0)
    topics.built(0)
    assert not topics.stale(0)
    for row in near(0, 4, seed=8, spread=0.01):  # four of eight
        topics.assign(row)
    assert not topics.stale(0)
    topics.assign(near(0, 1, seed=9, spread=0.01)[0])
    assert topics.stale(0)
    topics.built(0)
    moved = near(0, 60, seed=4) + near(1, 60, seed=4)
    for row in moved / np.linalg.norm(moved, axis=1, keepdims=True):
        topics.assign(row)
    assert topics.stale(0)


def test_clustering_anew_keeps_ids_by_likeness() -> None:
    topics = grown(near(0, 10), near(1, 10))
    topics.hit(1)
    for number in (0, 1):
        topics.built(number)
    assert topics.due
    assert not grown(near(0, 15)).due
    for row in np.concatenate([near(2, 4), near(1, 9, seed=2)]):
        topics.assign(row)
    assert topics.pending == [20, 21, 22, 23]
    topics.recluster(3)
    members = {t.id: t.members for t in topics.topics}
    assert members == {0: [*range(10)], 1: [*range(10, 20), *range(24, 33)], 2: [20, 21, 22, 23]}
    assert (topics.pending, topics.due, topics.hits) == ([], False, {1: 1})
    assert (topics.stale(0), topics.stale(2)) == (False, True)
    topics.recluster(1)
    assert [t.id for t in topics.topics] == [1]
    topics.recluster(2)
    assert [t.id for t in topics.topics] == [1, 3] or [t.id for t in topics.topics] == [3, 1]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.integers(0, 3), st.integers(1, 9)),
        st.tuples(st.sampled_from(["cluster", "build", "hit"]), st.integers(1, 4), st.just(0)),
    ),
    max_size=8,
)


def take(topics: Topics, steps: list[tuple[str, int, int]]) -> None:
    for number, (kind, which, count) in enumerate(steps):
        if kind == "say":
            for row in near(which, count, seed=number, spread=0.25):
                topics.assign(row)
        elif kind == "cluster":
            topics.recluster(which)
        elif topics.topics:
            one = topics.topics[which % len(topics.topics)].id
            (topics.built if kind == "build" else topics.hit)(one)


def test_titles_are_the_words_of_a_topic() -> None:
    said = [
        "We planted seeds in the garden",
        "The garden fence",
        "Seeds again",
        "The dog ran to the garden",
        "Dogs",
    ]
    segments = [Segment(i, i, text, 0, 0) for i, text in enumerate(said)]
    rows = np.concatenate([near(0, 3), near(1, 2)])
    assert titles(cluster(rows, 2), segments, count=2) == {0: "seeds, fence", 1: "dog, ran"}
    assert titles(cluster(rows, 1), segments, count=2) == {0: "garden, dog"}
