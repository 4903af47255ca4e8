"""A decode step on its way: the device is at it, and nobody has its tokens yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from agentmem.engine.batch import Failures
from agentmem.engine.draw import Chosen, Draw
from agentmem.engine.feed import Fed
from agentmem.engine.sequence import Sequence

Outcome = tuple[Sequence, list[Chosen] | Exception]


@dataclass(frozen=True, slots=True)
class Launched:
    """`lengths` of the sequences' tables before it; what they were `fed`; `drawn` are those whose next tokens `draw` chooses."""

    sequences: list[Sequence]
    lengths: list[int]
    fed: Fed
    drawn: list[Sequence]
    draw: Draw | None

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.fed.arrays, *(self.draw.arrays if self.draw is not None else [])]

    def still(self, sequences: list[Sequence]) -> list[int]:
        """Which of its sequences are among `sequences`, as they were when it was launched."""
        return [
            i
            for i, (s, n) in enumerate(zip(self.sequences, self.lengths, strict=True))
            if s in sequences and s.table is not None and len(s.table) == n
        ]

    def wait(self) -> None:
        mx.eval(self.arrays)

    def apply(self, kept: list[int]) -> Failures:
        """Give the tables of `kept` their rows; see `DecodeStep.apply`."""
        tokens = [s.last for i in kept if (s := self.sequences[i]).last is not None]
        return self.fed.apply(tokens, kept)

    def read(self, kept: list[int], failures: Failures, piece: Callable[[int], bytes]) -> list[Outcome]:
        """The tokens of `kept`, once they are there."""
        chosen = dict(zip(self.drawn, self.draw.read(piece), strict=True)) if self.draw is not None else {}
        outcomes: list[Outcome] = []
        for i in kept:
            sequence = self.sequences[i]
            tokens = chosen.get(sequence, []) if sequence.phase != "closing" else []
            outcomes.append((sequence, failures.get(i, tokens)))
        return outcomes
