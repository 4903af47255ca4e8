"""Background: a request for which nobody waits is read while nobody else is there, and gives way between two chunks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from agentmem.engine.folds import Folds
from agentmem.engine.sequence import Sequence

if TYPE_CHECKING:
    from agentmem.engine.planner import Planner


def others(sequences: Iterable[Sequence]) -> int:
    """How many of these somebody waits for."""
    return sum(not s.background for s in sequences)


class Background:
    """Says when background work must stand aside. Engine thread only."""

    def __init__(self, planner: Planner, folds: Folds) -> None:
        self._planner, self._folds = planner, folds

    def waiting(self, active: list[Sequence], waiting: list[Sequence]) -> list[Sequence]:
        """Those of `waiting` that may be admitted. What stands aside is planned anew later, behind what is said meanwhile."""
        if not others(active) and not others(waiting):
            return list(waiting)
        for sequence in waiting:
            if sequence.background and sequence.session is not None:
                self._folds.served(sequence.session)
                self._planner.drop(sequence)
                sequence.session = None
        return [s for s in waiting if not s.background]

    def running(self, active: list[Sequence]) -> list[Sequence]:
        """Those of `active` whose prompts may be read."""
        return [s for s in active if not s.background] if others(active) else active

    def leaving(self, active: list[Sequence], waiting: list[Sequence]) -> list[Sequence]:
        """Those that end here, so that one of `waiting` has room: what was read of them is committed, and they go on later."""
        if others(active) or not others(waiting):
            return []
        return [s for s in active if s.background and s.phase == "prefill" and s.history > s.reused]
