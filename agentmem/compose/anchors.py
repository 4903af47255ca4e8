"""Anchors: texts of a slot whose state is known both alone and in its place."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import mlx.core as mx
import numpy as np

from agentmem.compose.offsets import Gram, Kriging, Observed, traits
from agentmem.compose.packed import PackedState, Samples
from agentmem.compose.state import State, key_width

BASE_BITS, DELTA_BITS = 8, 2
"""An error is relative to what is packed: for an offset, a tenth of a key and weighted with hundreds of others, that of 2 bits
is small; for a base it is not."""
MINIMUM = 5
"""Anchors below which offsets are not used: one alone is worse than none."""
PER_SLOT = 20
PAPER_WINDOW, PAPER_GAMMA, PAPER_TOP = 5, 0.3, 0.9


class Eviction(StrEnum):
    DECAYED = "decayed"
    PAPER = "paper"


@dataclass(slots=True)
class Anchor:
    """One text of a slot.

    base: what it is compared by with others, its traits; all of it alone, in the paper's pool. offsets: for each consumer, what
    the slot and the fixed text behind it went through.
    """

    text: bytes
    base: PackedState
    offsets: dict[str, tuple[PackedState, PackedState]] = field(default_factory=dict)
    hits: float = 0.0
    users: int = 0

    def __len__(self) -> int:
        return len(self.base)

    @property
    def whole(self) -> bool:
        """Whether its base is all of its text's state, and not its traits alone."""
        return self.base.shapes[0].key_dim > 0

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + sum(p.nbytes for pair in self.offsets.values() for p in pair)

    def observed(self, consumer: str) -> Observed:
        slot, after = self.offsets[consumer]
        return Observed(self.base.unpacked(), slot.unpacked(), after.unpacked())


class Pool:
    """The anchors of all slots, oldest first, within a number per slot and a budget in bytes."""

    def __init__(
        self,
        budget: int,
        per_slot: int = PER_SLOT,
        eviction: Eviction = Eviction.DECAYED,
        half_life: float = 64.0,
    ) -> None:
        self.budget, self.per_slot, self.eviction = budget, per_slot, eviction
        self._fade = 0.5 ** (1 / half_life)
        self._slots: dict[str, OrderedDict[bytes, Anchor]] = {}
        self._grams: dict[str, tuple[Kriging, Gram]] = {}
        self._samples: dict[tuple[str, str, bool], Samples] = {}

    @property
    def whole(self) -> bool:
        """Whether anchors have all of their text's state, which only the paper's weights and gate ask for."""
        return self.eviction is Eviction.PAPER

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    @property
    def nbytes(self) -> int:
        """With what is kept to make use of anchors faster."""
        return self.anchor_bytes + self._kept_bytes

    @property
    def anchor_bytes(self) -> int:
        return sum(a.nbytes for _, a in self.items())

    def gram(self, slot: str, anchors: Sequence[Anchor], offsets: Kriging) -> Gram:
        """What `offsets` needs of these anchors; kept until they are other ones, if there is room."""
        texts = tuple(a.text for a in anchors)
        by, found = self._grams.get(slot, (offsets, None))
        if found is None or (by, found.texts) != (offsets, texts):
            self._grams.pop(slot, None)
            found = offsets.gram(texts, [traits(a.base.unpacked()) for a in anchors])
            if self.nbytes + found.nbytes <= self.budget:
                self._grams[slot] = offsets, found
        return found

    def samples(
        self, slot: str, consumer: str, offsets: Sequence[PackedState], at: Sequence[np.ndarray] | None = None
    ) -> Samples:
        """These offsets, at these places, side by side; kept until they are other ones, if there is room."""
        name = slot, consumer, at is None
        found, counts = self._samples.get(name), tuple(map(len, offsets if at is None else at))
        if found is None or (*map(id, found.states), *found.counts) != (*map(id, offsets), *counts):
            self._samples.pop(name, None)
            found = Samples.of(offsets, at)
            mx.eval(found.codes, found.scales, found.biases)
            if self.nbytes + found.nbytes <= self.budget:
                self._samples[name] = found
        return found

    @property
    def _kept_bytes(self) -> int:
        return sum(g.nbytes for _, g in self._grams.values()) + sum(s.nbytes for s in self._samples.values())

    def _let_go(self, slot: str) -> None:
        """The slot's anchors change: what was kept of them goes."""
        self._grams.pop(slot, None)
        self._samples = {name: s for name, s in self._samples.items() if name[0] != slot}

    def of_slot(self, slot: str) -> list[Anchor]:
        return list(self._slots.get(slot, {}).values())

    def items(self) -> Iterator[tuple[str, Anchor]]:
        """Every anchor with its slot."""
        return ((slot, anchor) for slot, anchors in self._slots.items() for anchor in anchors.values())

    def add(self, slot: str, anchor: Anchor) -> None:
        """Keep an anchor as it was packed before; it goes at once where there is no room."""
        anchors = self._slots.setdefault(slot, OrderedDict())
        self._make_room(anchors)
        anchors[anchor.text] = anchor
        self._let_go(slot)
        self._shrink(keep=anchor)

    def drop(self, slot: str, text: bytes | None = None) -> None:
        """Forget one anchor of a slot, or all of them."""
        self._let_go(slot)
        if text is None:
            self._slots.pop(slot, None)
        elif slot in self._slots:
            self._slots[slot].pop(text, None)

    def eligible(self, slot: str, consumer: str, length: int) -> list[Anchor]:
        """Anchors that know this consumer and have `length` tokens at least."""
        return [a for a in self.of_slot(slot) if len(a) >= length and consumer in a.offsets]

    def observe(
        self, slot: str, text: bytes, base: State, consumer: str, offset: State, after: State
    ) -> None:
        """Keep what a dense run has shown; offsets are those of float32, packed once."""
        anchors = self._slots.setdefault(slot, OrderedDict())
        self._samples = {name: s for name, s in self._samples.items() if name[0] != slot}
        if text not in anchors:
            self._make_room(anchors)
            anchors[text] = Anchor(text, PackedState.of(base if self.whole else traits(base), BASE_BITS))
        anchors[text].offsets[consumer] = (
            PackedState.of(offset, DELTA_BITS), PackedState.of(after, DELTA_BITS)
        )  # fmt: skip
        self._shrink(keep=anchors[text])

    @contextmanager
    def without(self, texts: Collection[bytes]) -> Iterator[None]:
        """As if nothing were known of these texts. Nothing may be observed meanwhile."""
        whole = self._slots
        self._slots = {
            slot: OrderedDict((t, a) for t, a in anchors.items() if t not in texts)
            for slot, anchors in whole.items()
        }
        try:
            yield
        finally:
            self._slots = whole

    def count(self, used: Sequence[Anchor]) -> None:
        """These anchors served a request; what others served long ago counts less and less."""
        for anchors in self._slots.values():
            for anchor in anchors.values():
                anchor.hits *= self._fade if self.eviction is Eviction.DECAYED else 1.0
        for anchor in used:
            anchor.hits += 1

    def _make_room(self, anchors: OrderedDict[bytes, Anchor]) -> None:
        while len(anchors) >= self.per_slot and (victim := self._victim(anchors)) is not None:
            del anchors[victim.text]

    def _shrink(self, keep: Anchor) -> None:
        if self.nbytes > self.budget:
            self._grams.clear()
            self._samples.clear()
        while self.nbytes > self.budget:
            victims = [
                (victim, anchors)
                for anchors in self._slots.values()
                if (victim := self._victim(OrderedDict((t, a) for t, a in anchors.items() if a is not keep)))
            ]
            if not victims:
                break
            victim, anchors = min(victims, key=lambda pair: pair[0].hits)
            del anchors[victim.text]
        if self.nbytes > self.budget:
            for anchors in self._slots.values():
                if anchors.get(keep.text) is keep and not keep.users:
                    del anchors[keep.text]

    def _victim(self, anchors: OrderedDict[bytes, Anchor]) -> Anchor | None:
        """The anchor that served least, of the oldest ones in the paper's way; none that a request is using."""
        candidates = list(anchors.values())
        if self.eviction is Eviction.PAPER:
            candidates = candidates[:PAPER_WINDOW]
        free = [a for a in candidates if not a.users]
        return min(free, key=lambda a: a.hits) if free else None


@dataclass(frozen=True, slots=True)
class Gate:
    """The paper's decision on a text: whether it may be composed, and which anchors count as used."""

    shareable: bool
    used: tuple[int, ...] = ()


def paper_gate(text: State, anchors: Sequence[State], gamma: float = PAPER_GAMMA) -> Gate:
    """Shareable when one anchor is clearly the nearest: the entropy of the weights is at most `gamma` of the largest possible.

    Anchors are as long as the text at least; distances are those of their values. The anchors that count as used are those
    that make up the first 0.9 of the weights, one at least (the paper's code counts all where the first alone makes them up).
    """
    if len(anchors) < 2:
        return Gate(False)
    n, values = len(text), key_width(text.shapes)
    apart = [mx.linalg.norm(text.rows[:, values:] - a.rows[:n, values:]) for a in anchors]
    distances = np.array(mx.stack(apart), dtype=np.float64)
    weights = np.exp(-(distances - distances.min()))
    weights /= weights.sum()
    entropy = -sum(w * math.log2(w) for w in weights if w > 0)
    if entropy > gamma * math.log2(len(anchors)):
        return Gate(False)
    order = np.argsort(-weights, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order]), PAPER_TOP)) + 1
    return Gate(True, tuple(int(i) for i in order[:count]))
