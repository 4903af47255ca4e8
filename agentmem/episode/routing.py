"""Which episode a question belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agentmem.episode.topic import Rows, Topic, cosines
from agentmem.episode.words import content_words

VOTERS = 3
MARGIN = 0.02
FLOOR = 0.30
"""Of MiniLM: questions about a conversation stay below it once in twenty times, questions about another four times in five."""
SHORT = 5


@dataclass(frozen=True, slots=True)
class Routing:
    """The episode of a turn.

    topic: None where there are no topics. votes: of the nearest segments, by topic. similarity: the question's cosine to the
    topic's centroid. reason: in plain words.
    """

    topic: int | None
    votes: dict[int, int]
    similarity: float
    reason: str


def question_text(message: str, previous: str | None = None) -> str:
    """What is embedded of a user's message: one with fewer than five content words says too little without that before it."""
    if previous and len(content_words(message)) < SHORT:
        return f"{previous}\n{message}"
    return message


def route(
    query: Rows,
    embeddings: Rows,
    topics: Sequence[Topic],
    active: int | None = None,
    margin: float = MARGIN,
    floor: float = FLOOR,
    titles: Mapping[int, str] | None = None,
) -> Routing:
    """The topic of most of the nearest segments; the nearer centroid decides between equals.

    query: unit vector [dims]. embeddings: unit rows [segments, dims]. active: the episode of the turn before, which stays
    where no centroid comes near `floor`, and where it has a vote and the chosen one is not nearer by `margin`. Without it the
    topic that spoke last counts as the most recent one. floor: see `agentmem.episode.encoder.thresholds_of`.
    """
    if not topics:
        return Routing(None, {}, 0.0, "there are no episodes yet")
    by_id = {topic.id: topic for topic in topics}
    centroids = np.stack([topic.centroid for topic in topics])
    near = dict(zip(by_id, cosines(centroids, query).tolist(), strict=True))
    votes = _votes(query, embeddings, topics)
    voters = sum(votes.values())
    chosen = max(by_id, key=lambda t: (votes.get(t, 0), near[t], -t))

    def decided(topic: int, why: str) -> Routing:
        title = f" ('{titles[topic]}')" if titles and titles.get(topic) else ""
        return Routing(topic, votes, near[topic], f"episode {topic}{title}: {why}")

    support = f"{votes.get(chosen, 0)} of {voters} nearest segments, similarity {near[chosen]:.2f}"
    recent = active if active in by_id else max(topics, key=lambda t: t.members[-1]).id
    if max(near.values()) < floor:
        return decided(
            recent, f"the most recent one; nothing is similar enough (best {max(near.values()):.2f})"
        )
    if active in by_id and active in votes and chosen != active and near[chosen] - near[active] <= margin:
        other = f"episode {chosen} has {support}, which is not {margin:.2f} above {near[active]:.2f}"
        return decided(active, f"stays; {other}")
    return decided(chosen, support)


def _votes(query: Rows, embeddings: Rows, topics: Sequence[Topic]) -> dict[int, int]:
    """Topics of the segments nearest to the query, the earlier of equals; pending segments have no vote."""
    owner = {segment: topic.id for topic in topics for segment in topic.members}
    segments = np.array(sorted(owner), dtype=np.int64)
    near = cosines(np.asarray(embeddings)[segments], query)
    nearest = segments[np.argsort(-near, kind="stable")[:VOTERS]]
    return dict(Counter(owner[int(s)] for s in nearest))
