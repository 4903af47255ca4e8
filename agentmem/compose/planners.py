"""What is read and what is put together: every way to reuse segments, as steps from left to right.

A plan never puts the last token, whose logits are asked for, and reads what it reads behind exactly what stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from agentmem.compose.anchors import MINIMUM, Anchor, Pool
from agentmem.compose.offsets import Kriging, Paper
from agentmem.compose.prompt import Prompt
from agentmem.compose.state import State, joined


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a prompt: fixed text of its template, or what fills a `slot` this time.

    base: their state in the canonical frame, without this prompt's context (fixed text in front of the first slot: with all
    of it, so that it is exact). `text` identifies what fills a slot.
    """

    ids: tuple[int, ...]
    base: State
    slot: str | None = None
    text: bytes = b""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.base)


@dataclass(frozen=True, slots=True)
class Put:
    """Append tokens with this state."""

    ids: tuple[int, ...]
    state: State


@dataclass(frozen=True, slots=True)
class Read:
    """Append tokens that the model reads."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """Append tokens with this state, and run the model over some of them: those that are `unknown`, bool [n], and have none, and
    `share` of the others."""

    ids: tuple[int, ...]
    state: State
    unknown: np.ndarray
    share: float

    @property
    def anew(self) -> int:
        """Tokens over all of whose layers the model is run, if there are layers above the one that chooses them."""
        unknown = int(self.unknown.sum())
        return unknown + int(self.share * (len(self.ids) - unknown))


Steps = list[Put | Read | Blend]

READ_SHARE = 0.0795
"""Of a prompt's tokens, that may be read where its end is read; to the nearest token."""


def run(prompt: Prompt, steps: Steps) -> mx.array:
    """Follow a plan; returns the logits [vocab] behind the last token."""
    logits = None
    put: list[Put] = []
    for step in [*merged(steps), Read(())]:
        if isinstance(step, Put):
            put.append(step)
            continue
        assert isinstance(step, Read)
        if put:
            prompt.put([i for p in put for i in p.ids], joined([p.state for p in put]))
            put = []
        if step.ids:
            logits = prompt.read(step.ids)
    assert logits is not None
    assert isinstance(steps[-1], Read)
    return logits


def merged(steps: Steps) -> Steps:
    """Reads that follow one another are one pass; steps without tokens go."""
    out: Steps = []
    for step in steps:
        if isinstance(step, Read) and out and isinstance(out[-1], Read):
            out[-1] = Read(out[-1].ids + step.ids)
        elif step.ids:
            out.append(step)
    return out


def dense(pieces: Sequence[Piece]) -> Steps:
    return [Read(p.ids) for p in pieces]


def exact(pieces: Sequence[Piece]) -> Steps:
    """The text in front of the first slot is remembered; everything else is read."""
    return [_put(pieces[0]), *(Read(p.ids) for p in pieces[1:])]


def repositioned(pieces: Sequence[Piece]) -> Steps:
    """Every piece as it was elsewhere, only moved."""
    return _but_last([_put(p) for p in pieces])


def lego(pieces: Sequence[Piece], first: int = 8) -> Steps:
    """EPIC (arXiv 2410.15332): the first tokens of each slot and all fixed text are read, the rest of the slots is moved."""
    steps: Steps = [_put(pieces[0])]
    for piece in pieces[1:]:
        if piece.slot is None:
            steps.append(Read(piece.ids))
        else:
            steps += [Read(piece.ids[:first]), Put(piece.ids[first:], piece.base[first:])]
    return _but_last(steps)


@dataclass(frozen=True, slots=True)
class Kvcomm:
    """KVCOMM (arXiv 2510.12872) for one consumer: slots, and the fixed text behind each, moved and set off by anchors.

    read_tail: the end is read instead, the last fixed text in any case. `minimum` anchors must be eligible for every slot, or
    one of the very text: what that went through stands for itself.
    """

    pool: Pool
    consumer: str
    read_tail: bool = True
    minimum: int = MINIMUM
    offsets: Kriging | Paper = field(default_factory=Kriging)

    def anchors(self, pieces: Sequence[Piece]) -> list[list[Anchor]] | None:
        """The eligible anchors of each slot in turn; None if a slot has too few."""
        if self.offsets.aligned and not self.pool.whole:
            return None
        found = []
        for piece in pieces:
            if piece.slot is None:
                continue
            length = len(piece.ids) if self.offsets.aligned else 0
            anchors = self.pool.eligible(piece.slot, self.consumer, length)
            same = [a for a in anchors if a.text == piece.text and not self.offsets.aligned]
            if len(anchors) < self.minimum and not same:
                return None
            found.append(same or anchors)
        return found

    def plan(self, pieces: Sequence[Piece]) -> Steps | None:
        """None: too little is known, read it all."""
        found = self.anchors(pieces)
        if found is None:
            return None
        steps: Steps = [_put(pieces[0])]
        after: State | None = None
        slots = iter(found)
        for number, piece in enumerate(pieces[1:], start=1):
            last = number == len(pieces) - 1
            if piece.slot is not None:
                put, after = self._shifted(piece, next(slots), self.read_tail and number == len(pieces) - 2)
                steps.append(put)
            elif after is None or (last and self.read_tail):
                steps.append(Read(piece.ids))
            else:
                steps.append(Put(piece.ids, piece.base + after))
        return _but_last(reading_the_end(steps) if self.read_tail else steps)

    def _shifted(self, piece: Piece, anchors: Sequence[Anchor], alone: bool) -> tuple[Put, State | None]:
        """A slot's text, and what the fixed text behind it goes through; not asked for where the slot is `alone`."""
        if alone and isinstance(self.offsets, Kriging):
            return Put(piece.ids, piece.base + self._slot(piece, anchors, self.offsets)), None
        offset, after = self.shift(piece, anchors)
        return Put(piece.ids, piece.base + offset), after

    def prepare(self, slot: str) -> None:
        """Compute now what depends on this slot's anchors alone, rather than with the next prompt."""
        anchors = self.pool.eligible(slot, self.consumer, 0)
        if anchors and isinstance(self.offsets, Kriging):
            gram = self.pool.gram(slot, anchors, self.offsets)
            slots, afters = zip(*(a.offsets[self.consumer] for a in anchors), strict=True)
            self.pool.samples(slot, self.consumer, slots, gram.at)
            self.pool.samples(slot, self.consumer, afters)

    def shift(self, piece: Piece, anchors: Sequence[Anchor]) -> tuple[State, State]:
        """What a slot's text, and the fixed text behind it, go through, by anchors that `anchors` found."""
        if not isinstance(self.offsets, Kriging):
            return self.offsets(piece.base, [a.observed(self.consumer) for a in anchors])
        return self._slot(piece, anchors, self.offsets), self._after(piece, anchors, self.offsets)

    def _slot(self, piece: Piece, anchors: Sequence[Anchor], offsets: Kriging) -> State:
        packed = [a.offsets[self.consumer][0] for a in anchors]
        if anchors[0].text == piece.text:
            return packed[0].unpacked()
        assert piece.slot is not None
        gram = self.pool.gram(piece.slot, anchors, offsets)
        return offsets.packed(piece.base, self.pool.samples(piece.slot, self.consumer, packed, gram.at), gram)

    def _after(self, piece: Piece, anchors: Sequence[Anchor], offsets: Kriging) -> State:
        packed = [a.offsets[self.consumer][1] for a in anchors]
        if anchors[0].text == piece.text:
            return packed[0].unpacked()
        assert piece.slot is not None
        gram = self.pool.gram(piece.slot, anchors, offsets)
        return offsets.packed_after(piece.base, self.pool.samples(piece.slot, self.consumer, packed), gram)


def observe(pool: Pool, pieces: Sequence[Piece], prompt: Prompt, consumer: str) -> None:
    """Make anchors of a prompt that was read whole: what each slot, and the fixed text behind it, went through."""
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece.ids))

    def offset(number: int) -> State:
        return prompt.state(starts[number], starts[number + 1]) - pieces[number].base

    for number, piece in enumerate(pieces):
        if piece.slot is not None:
            pool.observe(piece.slot, piece.text, piece.base, consumer, offset(number), offset(number + 1))


def reading_the_end(steps: Steps, share: float = READ_SHARE, known: int = 0) -> Steps:
    """The last Read grows to the left until `share` of all tokens is read; `known`: tokens in front of the steps.

    What the answer attends to most stands there, and one pass reads it all.
    """
    total = known + sum(len(s.ids) for s in steps)
    more = round(share * total) - sum(len(s.ids) for s in steps if isinstance(s, Read))
    out = list(steps)
    end = len(out) - 1
    while more > 0 and end > 0 and isinstance(before := out[end - 1], Put):
        n = max(0, len(before.ids) - more)
        more -= len(before.ids) - n
        last = out[end]
        out[end - 1 : end + 1] = [Put(before.ids[:n], before.state[:n]), Read(before.ids[n:] + last.ids)]
        if n == 0:
            del out[end - 1]
            end -= 1
    return out


def _put(piece: Piece) -> Put:
    return Put(piece.ids, piece.base)


def _but_last(steps: Steps) -> Steps:
    """The last token is read in any case."""
    last = steps[-1]
    if not isinstance(last, Put):
        return steps
    return [*steps[:-1], Put(last.ids[:-1], last.state[:-1]), Read(last.ids[-1:])]
