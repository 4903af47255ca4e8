"""The planners of `planners` by name, asked for one slot after the other: not every text of a prompt need be known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from agentmem.compose.anchors import Anchor, Pool, paper_gate
from agentmem.compose.library import CONSUMER
from agentmem.compose.offsets import Paper
from agentmem.compose.planners import Kvcomm, Piece, Put, Read, Steps
from agentmem.compose.policy import Policy
from agentmem.compose.state import State


@dataclass(frozen=True, slots=True)
class Placed:
    """How a slot's text comes into the prompt.

    after: what the fixed text behind it goes through; None: that is read. anchors: those that it is made from.
    """

    steps: Steps
    after: State | None = None
    anchors: list[Anchor] = field(default_factory=list)


class Way(Protocol):
    """One planner. tail: whether the text behind the last slot is read. smooth: whether little is read rather than put. lacks:
    what is missing where a text has no place."""

    @property
    def tail(self) -> bool: ...

    @property
    def smooth(self) -> bool: ...

    @property
    def lacks(self) -> str: ...

    def place(self, piece: Piece) -> Placed | None:
        """None: too little is known of its slot."""
        ...


@dataclass(frozen=True, slots=True)
class Lego:
    """The first tokens are read, and all fixed text."""

    first: int = 8
    tail: bool = True
    smooth: bool = True
    lacks: str = ""

    def place(self, piece: Piece) -> Placed | None:
        n = self.first
        return Placed([Read(piece.ids[:n]), Put(piece.ids[n:], piece.base[n:])])


@dataclass(frozen=True, slots=True)
class Moved:
    """Every text as it was elsewhere; all fixed text is read."""

    tail: bool = False
    smooth: bool = False
    lacks: str = ""

    def place(self, piece: Piece) -> Placed | None:
        return Placed([Put(piece.ids, piece.base)])


@dataclass(frozen=True, slots=True)
class Anchored:
    """Offsets from anchors."""

    planner: Kvcomm
    tail: bool
    smooth: bool
    lacks: str = "too few anchors"

    def place(self, piece: Piece) -> Placed | None:
        found = self.planner.anchors([piece])
        if found is None:
            return None
        offset, after = self.planner.shift(piece, found[0])
        return Placed([Put(piece.ids, piece.base + offset)], after, found[0])


@dataclass(frozen=True, slots=True)
class PaperWay:
    """The paper's: its weights, and its gate on every text."""

    planner: Kvcomm
    tail: bool = False
    smooth: bool = False
    lacks: str = "too few anchors as long, or none clearly the nearest,"

    def place(self, piece: Piece) -> Placed | None:
        found = self.planner.anchors([piece])
        if found is None:
            return None
        anchors = found[0]
        gate = paper_gate(piece.base, [a.base.unpacked() for a in anchors])
        if not gate.shareable:
            return None
        offset, after = self.planner.shift(piece, anchors)
        return Placed([Put(piece.ids, piece.base + offset)], after, [anchors[i] for i in gate.used])


def way(name: str, pool: Pool, policy: Policy) -> Way:
    """The planner of this name."""
    match name:
        case "lego":
            return Lego()
        case "blend":
            return Moved()
        case "paper":
            return PaperWay(Kvcomm(pool, CONSUMER, read_tail=False, minimum=2, offsets=Paper()))
        case _:
            tail = name.endswith("+tail")
            return Anchored(Kvcomm(pool, CONSUMER, read_tail=tail, minimum=policy.minimum), tail, tail)
