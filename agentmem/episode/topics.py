"""Topics of a conversation that goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentmem.episode.topic import (
    MOST,
    REPRESENTATIVES,
    SEED,
    Rows,
    Topic,
    cluster,
    cosines,
    topic_of,
)

__all__ = ["Assigned", "Growth", "Topic", "Topics", "cluster"]

RECENT_SHARE = 0.3
LEAST = 16
"""Segments of a first clustering: two topics with all their representatives."""
MOVED = 0.9
"""Cosine of a centroid to that of before, below which it has moved."""


class Assigned(NamedTuple):
    """Where a segment went: to a topic, or to the pending ones (None). merged: the topic that went, and into which."""

    segment: int
    topic: int | None
    opened: bool = False
    merged: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Growth:
    """How topics grow.

    apart: cosine to every centroid below which a segment waits; see `agentmem.episode.encoder.thresholds_of`. enough, alike:
    so many waiting segments, each with that mean cosine to the others, are a topic. most: topics at a time.
    """

    apart: float = 0.45
    enough: int = 8
    alike: float = 0.4
    most: int = MOST
    representatives: int = REPRESENTATIVES
    seed: int = SEED


class Topics:
    """Topics of a conversation that goes on: online spherical k-means, clustered anew now and then under the ids of before.

    Every segment has one topic, or none while it is pending. What comes of a sequence of calls depends on nothing else.
    """

    def __init__(self, dims: int, growth: Growth | None = None) -> None:
        self.growth = growth or Growth()
        self._rows = np.zeros((0, dims), np.float32)
        self._count = self._clustered = self._next = 0
        self._topics: dict[int, Topic] = {}
        self._pending: list[int] = []
        self._built: dict[int, tuple[NDArray[np.float64], list[int]]] = {}
        self.hits: dict[int, int] = {}

    def __len__(self) -> int:
        """Segments."""
        return self._count

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """Unit rows float32 [segments, dims]."""
        return self._rows[: self._count]

    @property
    def topics(self) -> list[Topic]:
        """By id."""
        return [self._topics[number] for number in sorted(self._topics)]

    @property
    def pending(self) -> list[int]:
        """Segments that are like no topic, in the order of the conversation."""
        return list(self._pending)

    @property
    def due(self) -> bool:
        """Whether there is enough for a clustering, and more than 30 % of the segments are newer than the last one.

        A conversation begins as one topic, or none: only clustering takes apart what came little by little.
        """
        return self._count >= LEAST and self._count - self._clustered > RECENT_SHARE * self._count

    def hit(self, topic: int) -> None:
        """A question was routed to this topic."""
        self.hits[topic] = self.hits.get(topic, 0) + 1

    def built(self, topic: int) -> None:
        """The topic's part of the attention state was chosen by its representatives of now."""
        now = self._topics[topic]
        centroid = now.centroid.astype(np.float16).astype(np.float64)
        self._built[topic] = centroid, list(now.representatives)

    def stale(self, topic: int) -> bool:
        """Whether the choice is another by now: half of the representatives changed, or the centroid moved; never chosen too."""
        if topic not in self._built:
            return True
        now, (centroid, representatives) = self._topics[topic], self._built[topic]
        changed = len(set(now.representatives) - set(representatives))
        moved = float(cosines(centroid[None], now.centroid)[0]) < MOVED
        return moved or 2 * changed > len(now.representatives)

    def assign(self, row: Rows) -> Assigned:
        """Take in the next segment, a unit vector [dims]."""
        segment = self._append(row)
        near = {t.id: float(cosines(t.centroid[None], row)[0]) for t in self.topics}
        best = max(near, key=lambda t: (near[t], -t), default=None)
        if best is None or near[best] < self.growth.apart:
            self._pending.append(segment)
            return self._opened(segment)
        self._put(best, [*self._topics[best].members, segment])
        return Assigned(segment, best)

    def _put(self, number: int, members: list[int]) -> None:
        self._topics[number] = topic_of(number, self.embeddings, members, self.growth.representatives)

    def cut(self, segments: int) -> None:
        """Forget the segments behind the first ones; topics without a segment go."""
        self._rows, self._count = self._rows[:segments].copy(), segments
        self._clustered = min(self._clustered, segments)
        for topic in self.topics:
            members = [m for m in topic.members if m < segments]
            if members:
                self._put(topic.id, members)
            else:
                del self._topics[topic.id]
        self._pending = [s for s in self._pending if s < segments]
        self._forget(set(self._built) | set(self.hits))

    def recluster(self, episodes: int | None = None) -> None:
        """Cluster all segments anew; a new topic takes the id of the old one that it is most like, overall (Hungarian method)."""
        from scipy.optimize import linear_sum_assignment

        growth, old = self.growth, self.topics
        found = cluster(self.embeddings, episodes, growth.seed, growth.representatives)
        ids: dict[int, int] = {}
        if found and old:
            likeness = np.stack([cosines(np.stack([o.centroid for o in old]), t.centroid) for t in found])
            pairs = zip(*linear_sum_assignment(likeness, maximize=True), strict=True)
            ids = {int(new): old[int(before)].id for new, before in pairs}
        self._topics = {}
        for number, topic in enumerate(found):
            topic.id = ids[number] if number in ids else self._new_id()
            self._topics[topic.id] = topic
        self._pending, self._clustered = [], self._count
        self._forget(set(self._built) | set(self.hits))

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Everything, as plain arrays and what JSON can hold; `relabelled` makes the same of it."""
        topics = self.topics
        labels = np.full(self._count, -1, np.int32)
        for topic in topics:
            labels[topic.members] = topic.id
        dims = self._rows.shape[1]
        arrays: dict[str, NDArray[Any]] = {
            "embeddings": self.embeddings.copy(),
            "labels": labels,
            "centroids": np.array([t.centroid for t in topics], np.float64).reshape(-1, dims),
            "built": np.array([c for _, (c, _) in sorted(self._built.items())], np.float64).reshape(-1, dims),
        }
        facts: dict[str, Any] = {
            "growth": asdict(self.growth),
            "topics": [[t.id, t.representatives, t.similarities] for t in topics],
            "built": [[number, chosen] for number, (_, chosen) in sorted(self._built.items())],
            "hits": [[number, hits] for number, hits in sorted(self.hits.items())],
            "clustered": self._clustered,
            "next": self._next,
        }
        return arrays, facts

    @classmethod
    def relabelled(
        cls, rows: Rows, labels: NDArray[np.int32], growth: Growth, topics: Sequence[int], hits: Sequence[tuple[int, int]],
        clustered: int, following: int, built: Mapping[int, tuple[NDArray[np.float64], list[int]]],
    ) -> Topics:  # fmt: skip
        """Topics by the labels of their segments, -1 for pending ones; `following` is the id of the next one.

        Raises ValueError where segments and labels, or labels and topics, do not go together.
        """
        self = cls(rows.shape[1], growth)
        if len(labels) != len(rows) or set(labels.tolist()) - {-1} != set(topics):
            raise ValueError("labels are not those of these segments and topics")
        self._rows, self._count = np.asarray(rows, np.float32).copy(), len(rows)
        for number in topics:
            self._put(number, np.flatnonzero(labels == number).tolist())
        self._pending = np.flatnonzero(labels == -1).tolist()
        self._built, self.hits = dict(built), dict(hits)
        self._clustered, self._next = clustered, following
        return self

    def _append(self, row: Rows) -> int:
        if self._count == len(self._rows):
            more = np.zeros((max(64, self._count), self._rows.shape[1]), np.float32)
            self._rows = np.concatenate([self._rows, more])
        self._rows[self._count] = row
        self._count += 1
        return self._count - 1

    def _opened(self, segment: int) -> Assigned:
        """Open a topic where the newest pending segment and those most like it are enough and alike."""
        growth, rows = self.growth, self.embeddings
        if len(self._pending) < growth.enough:
            return Assigned(segment, None)
        near = cosines(rows[self._pending], rows[segment])
        group = [self._pending[i] for i in np.argsort(-near, kind="stable")[: growth.enough]]
        unit = rows[group].astype(np.float64)
        pairs = unit @ unit.T
        to_others = (pairs.sum(axis=1) - np.diag(pairs)) / (len(group) - 1)
        # The mean of all pairs would let a stranger in with seven that are very much alike.
        if to_others.min() <= growth.alike:
            return Assigned(segment, None)
        like = cosines(rows[self._pending], unit.mean(axis=0)) >= growth.apart
        members = sorted({*group, *(s for s, alike in zip(self._pending, like, strict=True) if alike)})
        topic = topic_of(self._new_id(), rows, members, growth.representatives)
        self._topics[topic.id] = topic
        self._pending = [s for s in self._pending if s not in set(members)]
        merged = self._merge() if len(self._topics) > growth.most else None
        home = merged[1] if merged is not None and merged[0] == topic.id else topic.id
        return Assigned(segment, home, opened=home == topic.id, merged=merged)

    def _merge(self) -> tuple[int, int]:
        """Make one of the two closest topics, under the older id; returns (gone, into)."""
        topics = self.topics
        centroids = np.stack([t.centroid for t in topics])
        closest = max(
            ((i, j) for j in range(len(topics)) for i in range(j)),
            key=lambda pair: float(cosines(centroids[pair[0]][None], centroids[pair[1]])[0]),
        )
        into, gone = (topics[i] for i in closest)
        self._put(into.id, into.members + gone.members)
        del self._topics[gone.id]
        self.hits[into.id] = self.hits.get(into.id, 0) + self.hits.get(gone.id, 0)
        self._built.pop(into.id, None)
        self._forget({gone.id})
        return gone.id, into.id

    def _forget(self, numbers: set[int]) -> None:
        """Drop what is kept of those that are no topics any more."""
        for number in numbers - set(self._topics):
            self._built.pop(number, None)
            self.hits.pop(number, None)

    def _new_id(self) -> int:
        self._next += 1
        return self._next - 1
