"""Which episode a question belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agentmem.episode.topic import Rows, Topic, cosines
from agentmem.episode.words import content_words

WORDS = 1.5
"""What it adds to a segment's similarity that an utterance has all of the question's words."""
KNOWN = 0.5
"""Share of the words: of questions below the floor 2 in 5 reach it, of those about another conversation 1 in 100."""
MARGIN = 0.02
FLOOR = 0.30
"""Of MiniLM: questions about a conversation stay below it once in twenty times, questions about another four times in five."""
SHORT = 5


@dataclass(frozen=True, slots=True)
class Routing:
    """The episode of a turn.

    topic: None where there are no topics. scores: of each topic's best segment. similarity: the question's cosine to the topic's
    centroid. reason: in plain words.
    """

    topic: int | None
    scores: dict[int, float]
    similarity: float
    reason: str


def question_text(message: str, previous: str | None = None) -> str:
    """What is embedded of a user's message: one with fewer than five content words says too little without that before it."""
    if previous and len(content_words(message)) < SHORT:
        return f"{previous}\n{message}"
    return message


def route(
    query: Rows,
    coverage: Rows,
    embeddings: Rows,
    topics: Sequence[Topic],
    active: int | None = None,
    margin: float = MARGIN,
    floor: float = FLOOR,
    titles: Mapping[int, str] | None = None,
) -> Routing:
    """The topic of the segment that is nearest to the question in meaning and in words together.

    query: unit vector [dims]. coverage: how much of the question's words each segment has, [segments]; see
    `agentmem.episode.concordance`. embeddings: unit rows [segments, dims]. active: the episode of the turn before, which stays
    where no centroid comes near `floor` and no segment has half of the words, and where its best segment is worse by `margin` at
    most. Without it the topic that spoke last counts as the most recent one. floor: see
    `agentmem.episode.encoder.thresholds_of`.
    """
    if not topics:
        return Routing(None, {}, 0.0, "there are no episodes yet")
    by_id = {topic.id: topic for topic in topics}
    centroids = np.stack([topic.centroid for topic in topics])
    near = dict(zip(by_id, cosines(centroids, query).tolist(), strict=True))
    # Half the width is enough for what is near, and there may be thousands.
    alike = (np.asarray(embeddings, np.float32) @ np.asarray(query, np.float32)).astype(np.float64)
    each = alike + WORDS * coverage
    best = {t.id: t.members[int(each[t.members].argmax())] for t in topics}
    scores = {t: float(each[s]) for t, s in best.items()}
    chosen = max(by_id, key=lambda t: (scores[t], near[t], -t))
    known = max(float(coverage[t.members].max()) for t in topics)

    def decided(topic: int, why: str) -> Routing:
        title = f" ('{titles[topic]}')" if titles and titles.get(topic) else ""
        return Routing(topic, scores, near[topic], f"episode {topic}{title}: {why}")

    found = best[chosen]
    support = f"a segment of similarity {alike[found]:.2f} with {coverage[found]:.0%} of the words"
    recent = active if active in by_id else max(topics, key=lambda t: t.members[-1]).id
    if max(near.values()) < floor and known < KNOWN:
        why = f"nothing is similar enough (best {max(near.values()):.2f}) or has half of the words"
        return decided(recent, f"the most recent one; {why}")
    if active in by_id and chosen != active and scores[chosen] - scores[active] <= margin:
        return decided(active, f"stays; episode {chosen} has {support}, which is not {margin:.2f} better")
    return decided(chosen, support)
