"""What a conversation is about while it goes on: its segments, their topics, and which of them a question belongs to."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from agentmem.episode.concordance import Concordance, concordance_of
from agentmem.episode.encoder import Encoder, thresholds_of
from agentmem.episode.patched import LIMIT, Chat, patched_prompt
from agentmem.episode.routing import Routing, question_text, route
from agentmem.episode.segment import WINDOW, Segment, segments_of
from agentmem.episode.titles import titles
from agentmem.episode.topic import MOST, Topic
from agentmem.episode.topics import LEAST, Growth, Topics
from agentmem.episode.utterance import utterances_of

LINE = 120
"""Characters of a line that stands for a segment."""


class Life:
    """One session's topics. Embeddings are rounded to 16 bits when they come in: they are the same when they are read back.

    `episodes`: how many topics there are to be; by the length of the conversation where nobody says.
    """

    def __init__(self, encoder: Encoder, episodes: int | None = None) -> None:
        self.encoder_name = encoder.name
        self._encoder, self._episodes = encoder, episodes
        growth = Growth(apart=thresholds_of(encoder.name).segment, most=episodes or MOST)
        self._topics = Topics(encoder.dims, growth)
        self._segments: list[Segment] = []
        self._words = Concordance()
        self._recorded, self._last = 0, dict[str, Any]()
        self._built: dict[int, list[Any]] = {}

    @property
    def segments(self) -> list[Segment]:
        return list(self._segments)

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """Float32 [segments, dims]."""
        return self._topics.embeddings

    @property
    def topics(self) -> list[Topic]:
        """By id."""
        return self._topics.topics

    @property
    def hits(self) -> dict[int, int]:
        """How many questions were routed to each topic."""
        return self._topics.hits

    @cached_property
    def titles(self) -> dict[int, str]:
        """A few words for each topic."""
        return titles(self.topics, self._segments)

    def grow(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Take in what the whole conversation, as it is now, has more; returns whether anything changed.

        Only whole segments count. Where earlier messages are others than before, everything from there on is taken in anew.
        """
        said = utterances_of(messages)
        segments = segments_of(said[: len(said) // WINDOW * WINDOW])
        kept = _common(self._segments, segments)
        if kept == len(self._segments) == len(segments):
            return False
        if kept < len(self._segments):
            self._topics.cut(kept)
            self._words.cut(kept)
            self._recorded = min(self._recorded, kept)
        self._segments = segments
        if kept < len(segments):
            rows = self._encoder.encode([s.text for s in segments[kept:]])
            for row in rows.astype(np.float16).astype(np.float32):
                self._topics.assign(row)
            for segment in segments[kept:]:
                self._words.add(said[segment.first : segment.last + 1])
        few = not self._topics.topics and len(segments) >= LEAST
        if self._topics.due or few:
            self._topics.recluster(self._episodes)
        self.__dict__.pop("titles", None)
        return True

    def route(self, message: str, previous: str | None = None, active: int | None = None) -> Routing:
        """The topic that a message belongs to; see `agentmem.episode.routing.route`."""
        text = question_text(message, previous)
        query, coverage = self._encoder.encode([text], query=True)[0], self._words.coverage(text)
        floor = thresholds_of(self.encoder_name).question
        return route(query, coverage, self.embeddings, self.topics, active, floor=floor, titles=self.titles)

    def hit(self, topic: int) -> None:
        """A turn went to this topic."""
        self._topics.hit(topic)

    def built(self, topic: int) -> None:
        """The topic's view was chosen by its representatives of now."""
        self._topics.built(topic)

    def stale(self, topic: int) -> bool:
        """Whether its view would be another one now."""
        return self._topics.stale(topic)

    def prompt(self, topic: int, tokenizer: Chat, limit: int = LIMIT) -> list[int]:
        """What the topic's view is chosen by, `limit` tokens at most."""
        found = self._topic(topic)
        return patched_prompt(
            tokenizer, [self._segments[i] for i in found.representatives], limit, found.similarities
        )

    def lines(self, topic: int) -> list[str]:
        """How each segment begins that stands for the topic."""
        firsts = (self._segments[i].text.split("\n", 1)[0] for i in self._topic(topic).representatives)
        return [line if len(line) <= LINE else f"{line[: LINE - 1]}…" for line in firsts]

    def _topic(self, number: int) -> Topic:
        return next(t for t in self.topics if t.id == number)

    def record(self) -> dict[str, Any] | None:
        """What has changed since the last record, as JSON holds it; None for nothing. `restored` reads all of them in order."""
        arrays, facts = self._topics.state()
        built = {
            number: [chosen, _text(centroid)]
            for (number, chosen), centroid in zip(facts["built"], arrays["built"], strict=True)
        }
        now = {
            "labels": arrays["labels"].tolist(),
            "topics": [number for number, *_ in facts["topics"]],
            "built": sorted(built),
            "hits": facts["hits"],
            "clustered": facts["clustered"],
            "next": facts["next"],
            "text": _digest(self._segments),
        }
        fresh = {str(n): b for n, b in built.items() if self._built.get(n) != b}
        if now == self._last and not fresh and self._recorded == len(self._segments):
            return None
        rows = _text(self.embeddings[self._recorded :])
        record = {"encoder": self.encoder_name, "keep": self._recorded, "rows": rows, "fresh": fresh, **now}
        self._recorded, self._last, self._built = len(self._segments), now, built
        return record

    @classmethod
    def restored(
        cls,
        encoder: Encoder,
        messages: Sequence[Mapping[str, Any]],
        records: Sequence[Mapping[str, Any]],
        episodes: int | None = None,
    ) -> Life:
        """The life that these are the records of, with all of `messages` taken in.

        One that cannot be read, or is of other messages, begins anew.
        """
        try:
            life = cls._replayed(encoder, messages, records, episodes)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            life = cls(encoder, episodes)
        life.grow(messages)
        return life

    @classmethod
    def _replayed(
        cls, encoder: Encoder, messages: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], episodes: int | None
    ) -> Life:  # fmt: skip
        life = cls(encoder, episodes)
        rows, built = np.zeros((0, encoder.dims), np.float32), dict[int, list[Any]]()
        whole = max(number for number, record in enumerate(records) if record["keep"] == 0)
        for record in records[whole:]:
            if record["encoder"] != encoder.name:
                raise ValueError("these are another encoder's vectors")
            rows = np.concatenate([rows[: record["keep"]], _array(record["rows"], encoder.dims)])
            built |= {int(number): facts for number, facts in record["fresh"].items()}
            built = {number: built[number] for number in record["built"]}
        now = {k: v for k, v in records[-1].items() if k not in ("encoder", "keep", "rows", "fresh")}
        said = utterances_of(messages)
        life._segments = segments_of(said[: len(rows) * WINDOW])
        if len(life._segments) != len(rows) or _digest(life._segments) != now["text"]:
            raise ValueError("these are records of another conversation")
        life._words = concordance_of(said, life._segments)
        labels = np.array(now["labels"], np.int32)
        now["clustered"], now["next"] = int(now["clustered"]), int(now["next"])
        now["hits"] = [[int(number), int(hits)] for number, hits in now["hits"]]
        built = {n: [[int(i) for i in chosen], centroid] for n, (chosen, centroid) in built.items()}
        if not 0 <= now["clustered"] <= len(rows) or max(labels.tolist(), default=-1) >= now["next"]:
            raise ValueError("there are fewer segments or topics")
        life._topics = Topics.relabelled(
            rows, labels, life._topics.growth, now["topics"], now["hits"], now["clustered"], now["next"],
            {n: (_array(centroid, encoder.dims)[0].astype(np.float64), chosen) for n, (chosen, centroid) in built.items()},
        )  # fmt: skip
        life._recorded, life._last, life._built = len(rows), now, built
        return life


def _common(a: Sequence[Segment], b: Sequence[Segment]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n].text == b[n].text:
        n += 1
    return n


def _digest(segments: Sequence[Segment]) -> str:
    return xxhash.xxh3_64_hexdigest("\0".join(s.text for s in segments).encode("utf-8", "replace"))


def _text(rows: NDArray[Any]) -> str:
    return base64.b64encode(np.asarray(rows, np.float16).tobytes()).decode()


def _array(text: str, dims: int) -> NDArray[np.float32]:
    return (
        np.frombuffer(base64.b64decode(text, validate=True), np.float16).astype(np.float32).reshape(-1, dims)
    )
