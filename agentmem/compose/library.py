"""Everything that composed reuse keeps for one model: segments, fixed text and anchors of every namespace, within budgets."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from agentmem.compose.anchors import PER_SLOT, Anchor, Eviction, Pool
from agentmem.compose.declared import check
from agentmem.compose.recognise import Texts
from agentmem.compose.segment import Fixed, Held, Segment, text_hash
from agentmem.compose.state import State

HALF_LIFE = 64.0
"""Prompts after which having served counts half."""
CONSUMER = ""
"""A slot belongs to one template, so its anchors know one consumer."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text that was registered under a name. `ids` int32 [n]."""

    name: str
    ids: np.ndarray

    @property
    def kind(self) -> str:
        return f"document:{self.name}"


@dataclass(slots=True)
class Space:
    """What one namespace knows. Segments are found by the hash of their ids, fixed text by its chain."""

    segments: dict[bytes, Segment] = field(default_factory=dict)
    fixed: dict[bytes, Fixed] = field(default_factory=dict)
    documents: dict[bytes, Document] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    texts: Texts = field(default_factory=Texts)

    def __len__(self) -> int:
        return len(self.segments) + len(self.fixed) + len(self.documents) + len(self.templates)


@dataclass(slots=True)
class Source:
    """Which segment an anchor is made of, who has all the texts that went into it, and in whose prompts it was seen.

    made: its number; used: the clock at that time.
    """

    segment: bytes
    owners: set[str]
    seen_by: set[str]
    made: int = 0
    used: int = 0


class Library:
    """Budgets in bytes: `budget` for segments and fixed text, `anchor_budget` for anchors. Engine thread only.

    What is least useful goes first, nothing that a request is using. hops: segments further from exact state are not kept.
    """

    def __init__(
        self, budget: int, anchor_budget: int, *, per_slot: int = PER_SLOT,
        eviction: Eviction = Eviction.DECAYED, hops: int = 1,
    ) -> None:  # fmt: skip
        self.budget, self.hops = budget, hops
        self.pool = Pool(anchor_budget, per_slot, eviction)
        self.nbytes = 0
        self.clock = 0
        self.made = 0
        self.spaces: dict[str, Space] = {}
        self.sources: dict[tuple[str, bytes], Source] = {}
        self.fresh: set[str] = set()  # slots with other anchors than when they were prepared
        self._in_use: list[Held] = []

    def space(self, namespace: str) -> Space:
        return self.spaces.setdefault(namespace, Space())

    def segment(self, namespace: str, text: bytes) -> Segment | None:
        return self.space(namespace).segments.get(text)

    def fixed(self, namespace: str, key: bytes) -> Fixed | None:
        return self.space(namespace).fixed.get(key)

    @contextmanager
    def using(self) -> Iterator[list[Held]]:
        """What is put on this list stays until the end."""
        try:
            yield self._in_use
        finally:
            self._in_use.clear()

    def served(self, held: Held, agent: str) -> None:
        """A prompt of this agent has it."""
        held.hits = self.usefulness(held) + 1
        held.used = self.clock
        held.owners.add(agent)

    def usefulness(self, held: Held) -> float:
        """How often it served; long ago counts less and less."""
        return held.hits * 0.5 ** ((self.clock - held.used) / HALF_LIFE)

    def put(self, namespace: str, segment: Segment, agent: str) -> Segment | None:
        """Keep a segment; returns what is kept of its text, None where there is no room for it.

        State that is exact replaces state that is not, never the other way round.
        """
        space = self.space(namespace)
        old = space.segments.get(segment.text)
        if old is not None and (old.provenance.exact or not segment.provenance.exact):
            self.served(old, agent)
            return old
        if segment.provenance.hops > self.hops:
            return None
        if old is not None:
            segment.owners |= old.owners
            self._remove_segment(space, old)
        if not self._room(segment.nbytes):
            return None
        segment.created = segment.created or time.time()
        self.served(segment, agent)
        space.segments[segment.text] = segment
        self.nbytes += segment.nbytes
        document = space.documents.get(segment.text)
        space.texts.add(segment.text, segment.ids, document.kind if document else segment.kind)
        return segment

    def put_fixed(self, namespace: str, key: bytes, fixed: Fixed, agent: str) -> Fixed | None:
        """The same for fixed text. Anchors of a slot in front of it know another state of it: they go."""
        self._drop_slot(slot(namespace, key))
        if not self._room(fixed.nbytes):
            return None
        self.served(fixed, agent)
        self.space(namespace).fixed[key] = fixed
        self.nbytes += fixed.nbytes
        return fixed

    def observe(
        self, namespace: str, key: bytes, segment: Segment, text: bytes, base: State, offset: State, after: State,
        agent: str, owners: set[str],
    ) -> None:  # fmt: skip
        """Make an anchor of what a segment, known to anchors as `text`, went through in the slot `key`.

        owners: the agents that have all the texts that it was made of.
        """
        assert segment.provenance.exact
        name = slot(namespace, key)
        self.pool.observe(name, text, base, CONSUMER, offset, after)
        self.fresh.add(name)
        self.made += 1
        self.sources[name, text] = Source(segment.text, set(owners), {agent}, self.made, self.clock)
        self._forget_lost_anchors()

    def adopt(self, namespace: str, held: Segment | Fixed, key: bytes = b"") -> None:
        """Take in what was kept, if there is room; `key`: the chain of fixed text."""
        space = self.space(namespace)
        if self.nbytes + held.nbytes > self.budget:
            return
        if isinstance(held, Segment):
            if held.provenance.hops > self.hops:
                return
            space.segments[held.text] = held
            space.texts.add(held.text, held.ids, held.kind)
        else:
            space.fixed[key] = held
        self.nbytes += held.nbytes
        self.clock = max(self.clock, held.used)

    def adopt_anchor(self, name: str, anchor: Anchor, source: Source) -> None:
        self.pool.add(name, anchor)
        self.fresh.add(name)
        self.sources[name, anchor.text] = source
        self.made, self.clock = max(self.made, source.made), max(self.clock, source.used)
        self._forget_lost_anchors()

    def anchor(self, namespace: str, key: bytes, text: bytes) -> Anchor | None:
        """The anchor that was made of this very text."""
        return next((a for a in self.pool.of_slot(slot(namespace, key)) if a.text == text), None)

    def made_of(self, namespace: str, segment: bytes) -> frozenset[bytes]:
        """What anchors call a segment, or parts of it."""
        return frozenset(
            text
            for (name, text), source in self.sources.items()
            if source.segment == segment and name.rpartition("/")[0] == namespace
        )

    def register(self, namespace: str, name: str, ids: Iterable[int]) -> None:
        """Look for this text in prompts from now on, under a name; it replaces what had the name."""
        self.unregister(namespace, name)
        space, document = self.space(namespace), Document(name, np.fromiter(ids, dtype=np.int32))
        text = text_hash(document.ids)
        space.documents[text] = document
        space.texts.remove(text)
        space.texts.add(text, document.ids, document.kind)

    def unregister(self, namespace: str, name: str) -> None:
        """Its state stays while it is useful."""
        space = self.space(namespace)
        for text in [t for t, d in space.documents.items() if d.name == name]:
            del space.documents[text]
            space.texts.remove(text)
            if segment := space.segments.get(text):
                space.texts.add(text, segment.ids, segment.kind)

    def declare(self, namespace: str, name: str, text: str) -> None:
        """Cut prompts of this text at its {{slots}}. Raises BadRequest."""
        check(text)
        self.space(namespace).templates[name] = text

    def forget(self, namespace: str, agent: str | None = None) -> None:
        """Forget a namespace, or all that no other agent of it has: segments, fixed text, and the anchors made of them."""
        space = self.spaces.get(namespace)
        if space is None:
            return
        for segment in list(space.segments.values()):
            if _disown(segment.owners, agent):
                self._remove_segment(space, segment)
        for key, fixed in list(space.fixed.items()):
            if _disown(fixed.owners, agent):
                del space.fixed[key]
                self.nbytes -= fixed.nbytes
        for (name, text), source in list(self.sources.items()):
            if name.rpartition("/")[0] == namespace and (
                _disown(source.owners, agent) | _disown(source.seen_by, agent)
            ):
                self.pool.drop(name, text)
        self._forget_lost_anchors()
        if agent is None:
            del self.spaces[namespace]

    def _room(self, need: int) -> bool:
        """Make room for so many bytes; False where what is in use leaves too little."""
        if self.nbytes + need <= self.budget:
            return True
        in_use = {id(held) for held in self._in_use}
        free = [
            (space, held)
            for space in self.spaces.values()
            for held in (*space.segments.values(), *space.fixed.values())
            if id(held) not in in_use
        ]
        if need > self.budget - self.nbytes + sum(held.nbytes for _, held in free):
            return False
        free.sort(key=lambda pair: self.usefulness(pair[1]))
        for space, held in free:
            if self.nbytes + need <= self.budget:
                break
            self._remove(space, held)
        return True

    def _remove(self, space: Space, held: Held) -> None:
        if isinstance(held, Segment):
            self._remove_segment(space, held)
        else:
            for key in [k for k, f in space.fixed.items() if f is held]:
                del space.fixed[key]
                self.nbytes -= held.nbytes

    def _remove_segment(self, space: Space, segment: Segment) -> None:
        """Its anchors stay: they know their own base."""
        del space.segments[segment.text]
        self.nbytes -= segment.nbytes
        if segment.text not in space.documents:
            space.texts.remove(segment.text)

    def _drop_slot(self, name: str) -> None:
        self.pool.drop(name)
        self._forget_lost_anchors()

    def _forget_lost_anchors(self) -> None:
        """The pool lets anchors go by itself."""
        live = {(name, anchor.text) for name, anchor in self.pool.items()}
        for lost in self.sources.keys() - live:
            del self.sources[lost]

    def check_integrity(self) -> None:
        """Assert what always holds."""
        kept = [h for s in self.spaces.values() for h in (*s.segments.values(), *s.fixed.values())]
        assert self.nbytes == sum(h.nbytes for h in kept) <= self.budget
        assert self.pool.nbytes <= self.pool.budget
        assert self.sources.keys() == {(name, anchor.text) for name, anchor in self.pool.items()}
        for space in self.spaces.values():
            for text, segment in space.segments.items():
                assert segment.text == text == text_hash(segment.ids)
                assert segment.provenance.hops <= self.hops
                assert text in space.texts
                assert segment.owners


def slot(namespace: str, key: bytes) -> str:
    """The pool's name of a slot. `key`: the chain of the fixed text behind it."""
    return f"{namespace}/{key.hex()}"


def _disown(owners: set[str], agent: str | None) -> bool:
    """Whether nobody is left. Without an agent, all go."""
    owners.difference_update(owners if agent is None else {agent})
    return not owners
