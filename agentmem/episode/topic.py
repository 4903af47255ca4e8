"""Topics of a conversation: clusters of its segments, and the segments that stand for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 42
RESTARTS = 10
REPRESENTATIVES = 8
FEWEST, MOST = 2, 8
"""Episodes that a conversation may have, where it has as many segments."""
SEGMENTS_EACH = 40

Rows = NDArray[np.floating[Any]]


@dataclass(slots=True)
class Topic:
    """One cluster. Segments are numbers of rows, in the order of the conversation.

    centroid: float64 [dims], the mean of the members' unit vectors, so shorter than 1 itself. similarities: cosines of the
    representatives to the centroid.
    """

    id: int
    centroid: NDArray[np.float64]
    members: list[int]
    representatives: list[int]
    similarities: list[float]

    def __len__(self) -> int:
        return len(self.members)


def episodes_for(segments: int) -> int:
    """How many episodes a conversation of that many segments has where nobody says."""
    return min(MOST, max(FEWEST, round(segments / SEGMENTS_EACH)))


def cosines(rows: Rows, to: Rows) -> NDArray[np.float64]:
    """Cosine of every row [n, dims] to one vector [dims] -> float64 [n]; 0 for a vector of nothing."""
    rows, to = np.asarray(rows, np.float64), np.asarray(to, np.float64)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(to)
    return np.divide(rows @ to, lengths, out=np.zeros(len(rows)), where=lengths > 0)


def topic_of(number: int, embeddings: Rows, members: Sequence[int], count: int = REPRESENTATIVES) -> Topic:
    """The topic that these segments make up, its centroid their mean."""
    centroid = np.asarray(embeddings, np.float64)[list(members)].mean(axis=0)
    topic = Topic(number, centroid, sorted(members), [], [])
    represent(topic, embeddings, count)
    return topic


def represent(topic: Topic, embeddings: Rows, count: int = REPRESENTATIVES) -> None:
    """Choose the members nearest to the centroid, the earlier of equals, and put them in the order of the conversation."""
    near = cosines(embeddings[topic.members], topic.centroid)
    chosen = np.sort(np.argsort(-near, kind="stable")[:count])
    topic.representatives = [topic.members[i] for i in chosen]
    topic.similarities = [float(near[i]) for i in chosen]


def load_libraries() -> None:
    """Bring in what clustering needs, which takes seconds the first time. Any thread."""
    import sklearn.cluster  # noqa: F401


def cluster(
    embeddings: Rows, episodes: int | None = None, seed: int = SEED, representatives: int = REPRESENTATIVES
) -> list[Topic]:
    """k-means over unit rows [segments, dims] (EpiCache, section 3.1), topics by their first segment.

    There are never more topics than different rows; none for no rows at all.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    rows = np.asarray(embeddings, np.float64)
    if not len(rows):
        return []
    wanted = episodes_for(len(rows)) if episodes is None else episodes
    count = min(wanted, len(np.unique(rows, axis=0)))
    means = KMeans(count, init="k-means++", n_init=RESTARTS, random_state=seed)
    # So few rows are not worth a second thread, which spins for as long again.
    with threadpool_limits(1, user_api="openmp"):
        labels = means.fit_predict(rows)
    parts = [np.flatnonzero(labels == label).tolist() for label in range(count)]
    parts = sorted((part for part in parts if part), key=lambda part: part[0])
    return [topic_of(number, rows, part, representatives) for number, part in enumerate(parts)]
