"""One prompt put together: its parts from left to right, each put or read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from agentmem.compose.library import Library, slot
from agentmem.compose.planners import Piece, Put, Read, Steps, merged, reading_the_end
from agentmem.compose.policy import Policy
from agentmem.compose.recognise import BORDER, FIXED, SHORTEST, Part, chain
from agentmem.compose.segment import Segment, text_hash
from agentmem.compose.state import State
from agentmem.compose.ways import Way

SHORT_FIXED = 32
"""Fixed text beside a border is read with it, up to so many tokens: it takes a pass in any case."""


class TooLittle(Exception):
    """A slot whose text is known has too few anchors. The message says which."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A prompt cut into parts. keys: for each part the chain of the fixed text up to it."""

    namespace: str
    ids: np.ndarray
    parts: Sequence[Part]
    keys: Sequence[bytes] = ()

    @classmethod
    def of(cls, namespace: str, ids: np.ndarray, parts: Sequence[Part]) -> Layout:
        return cls(namespace, ids, parts, chain(ids, parts))

    @property
    def template(self) -> bytes:
        return self.keys[-1] if self.keys else b""

    def behind(self, number: int) -> int | None:
        """The next fixed text behind a part; None at the end of the prompt."""
        return next((n for n in range(number + 1, len(self.parts)) if self.parts[n].kind == FIXED), None)

    def tokens(self, part: Part) -> tuple[int, ...]:
        return tuple(self.ids[part.start : part.stop].tolist())


def segment_of(library: Library, layout: Layout, part: Part) -> tuple[Segment, int] | None:
    """The segment that a slot holds, and the segment's token with which it begins."""
    if part.text and (segment := library.segment(layout.namespace, part.text)):
        return segment, part.at
    segment = library.segment(layout.namespace, text_hash(layout.ids[part.start : part.stop]))
    return (segment, 0) if segment is not None else None


@dataclass(slots=True)
class Assembly:
    """The steps of one prompt behind its first `known` tokens, which are there."""

    library: Library
    layout: Layout
    way: Way
    policy: Policy
    known: int
    agent: str
    lines: list[str] = field(default_factory=list)
    _told: list[tuple[Part, int]] = field(default_factory=list)
    used: list[Segment] = field(default_factory=list)

    def steps(self) -> Steps:
        """Raises TooLittle."""
        steps: Steps = []
        after: State | None = None
        at = 0
        for number, part in enumerate(self.layout.parts):
            if part.stop > self.known:
                if part.is_slot:
                    new, after = self._slot(number, part)
                else:
                    new = self._fixed(number, part, after)
                steps += _behind(new, self.known - part.start)
            if part.kind == FIXED:
                after = None
            at = part.stop
        assert at == len(self.layout.ids)
        steps = merged(steps)
        steps = _ending_in_a_read(_smooth(steps) if self.way.smooth else steps)
        steps = reading_the_end(steps, known=self.known) if self.way.tail else steps
        self._tell(steps)
        return steps

    def _tell(self, steps: Steps) -> None:
        """Say of each part how much of it is put in the end."""
        kinds = np.repeat([isinstance(s, Put) for s in steps], [len(s.ids) for s in steps])
        for part, anchors in self._told:
            put = int(kinds[max(0, part.start - self.known) : part.stop - self.known].sum())
            if put:
                self.lines.append(_line(put, part.kind, anchors))

    def _slot(self, number: int, part: Part) -> tuple[Steps, State | None]:
        ids = self.layout.tokens(part)
        found, behind = segment_of(self.library, self.layout, part), self.layout.behind(number)
        if found is None or behind is None or found[0].provenance.hops > self.policy.hops:
            return [Read(ids)], None
        segment, at = found
        name = slot(self.layout.namespace, self.layout.keys[behind])
        base = segment.base.unpacked()[at : at + len(part)]
        placed = self.way.place(Piece(ids, base, name, segment.piece_text(at, at + len(part))))
        if placed is None:
            if len(part) < SHORTEST:
                return [Read(ids)], None
            raise TooLittle(f"{self.way.lacks} for {len(part)} tokens of {said(part.kind)}")
        self.library.served(segment, self.agent)
        self.library.pool.count(placed.anchors)
        self.used.append(segment)
        self._told.append((part, len(placed.anchors)))
        return placed.steps, placed.after

    def _fixed(self, number: int, part: Part, after: State | None) -> Steps:
        """Fixed text in front of the first slot is exact: where it is not there, it is read."""
        ids = self.layout.tokens(part)
        tail = self.way.tail and self.layout.behind(number) is None
        if part.kind == BORDER or after is None or len(after) != len(part) or tail:
            return [Read(ids)]
        around = self.layout.parts[max(0, number - 1) : number + 2]
        if self.way.smooth and len(part) <= SHORT_FIXED and any(p.kind == BORDER for p in around):
            return [Read(ids)]
        fixed = self.library.fixed(self.layout.namespace, self.layout.keys[number])
        if fixed is None:
            return [Read(ids)]
        self.library.served(fixed, self.agent)
        self._told.append((part, 0))
        return [Put(ids, fixed.base.unpacked() + after)]


def _behind(steps: Steps, known: int) -> Steps:
    """Without the first `known` tokens."""
    out: Steps = []
    for step in steps:
        n = min(max(known, 0), len(step.ids))
        known -= n
        if n < len(step.ids):
            out.append(Put(step.ids[n:], step.state[n:]) if isinstance(step, Put) else Read(step.ids[n:]))
    return out


def _smooth(steps: Steps) -> Steps:
    """Few tokens beside what is read are read too: that is exact, and one pass the less."""
    out = list(steps)
    for number, step in enumerate(steps):
        beside = steps[max(0, number - 1) : number + 2]
        if isinstance(step, Put) and len(step.ids) < SHORTEST and any(isinstance(s, Read) for s in beside):
            out[number] = Read(step.ids)
    return merged(out)


def _ending_in_a_read(steps: Steps) -> Steps:
    last = steps[-1] if steps else None
    if not isinstance(last, Put):
        return steps
    return merged([*steps[:-1], Put(last.ids[:-1], last.state[:-1]), Read(last.ids[-1:])])


def _line(tokens: int, kind: str, anchors: int) -> str:
    if kind == FIXED:
        return f"{tokens} tokens of fixed text composed"
    of = f"{tokens} tokens of {said(kind)}"
    return f"{of} composed from {anchors} anchor{'s' * (anchors != 1)}" if anchors else f"{of} moved"


def said(kind: str) -> str:
    """The kind of a text in words."""
    head, _, name = kind.partition(":")
    if name:
        return f"{head} '{name}'"
    return {"assistant": "an agent's reply", "tool": "a tool's result"}.get(head, f"a {head} message")
