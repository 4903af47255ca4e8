"""Segments: texts whose state is kept apart from the context in which it was first read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from agentmem.compose.packed import PackedState


def text_hash(ids: Sequence[int] | np.ndarray) -> bytes:
    """XXH3-128 of token ids: the same for the same ids."""
    return xxhash.xxh3_128_digest(np.asarray(ids, dtype="<i4").tobytes())


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a state came about: by reading all that stands in front of it (`exact`), or behind composed state.

    parents: the texts that were composed in front of it. hops: how many times composed state was built on composed state.
    """

    parents: tuple[bytes, ...] = ()
    hops: int = 0

    def __post_init__(self) -> None:
        assert bool(self.hops) >= bool(self.parents)

    @property
    def exact(self) -> bool:
        return self.hops == 0

    @classmethod
    def composed(cls, segments: Iterable[Segment]) -> Provenance:
        """What is said behind these."""
        used = list(segments)
        return cls(tuple(s.text for s in used), 1 + max((s.provenance.hops for s in used), default=0))


EXACT = Provenance()


@dataclass(slots=True, eq=False)
class Held:
    """A state that is kept: 8 bits, canonical.

    home: the fixed text in front of it where it was read, see `recognise.chain`. owners: agents in whose prompts it stood. mark:
    tells this state from others of the same text. used: the library's clock when it last served.
    """

    ids: np.ndarray
    base: PackedState
    home: bytes = b""
    owners: set[str] = field(default_factory=set)
    hits: float = 0.0
    used: int = 0
    mark: bytes = b""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.base)
        self.ids = np.asarray(self.ids, dtype=np.int32)
        self.mark = self.mark or _mark(self.base)

    @property
    def nbytes(self) -> int:
        return int(self.base.nbytes + self.ids.nbytes)


@dataclass(slots=True, eq=False)
class Fixed(Held):
    """Fixed text of a template, as it was when it was first read there."""


@dataclass(slots=True, eq=False)
class Segment(Held):
    """The content of a message, a reply, a document or a tool's result. created: seconds since 1970."""

    kind: str = "user"
    provenance: Provenance = EXACT
    created: float = 0.0
    text: bytes = b""

    def __post_init__(self) -> None:
        Held.__post_init__(self)  # `super()` does not know a class with slots
        self.text = self.text or text_hash(self.ids)

    def piece_text(self, start: int, stop: int) -> bytes:
        """What anchors know tokens `start` to `stop` by: offsets are of one state only."""
        return xxhash.xxh3_128_digest(self.mark + text_hash(self.ids[start:stop]))


def _mark(base: PackedState) -> bytes:
    sum = xxhash.xxh3_64()
    for part in (base.codes, base.scales, base.biases):
        sum.update(np.ascontiguousarray(np.asarray(part)).data)
    return sum.digest()
