"""Prompts that begin alike at the same time: one is prefilled, the others wait for it and go on from its state."""

from __future__ import annotations

import numpy as np

from agentmem.engine.sequence import Sequence


class Followers:
    """Finds leaders: of the sequences that were admitted before, the one whose prompt shares most with a new one.

    Without that, agents that start together would each compute the same state, and bits of their own.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._common: dict[tuple[Sequence, Sequence], int] = {}

    def ready(self, active: list[Sequence]) -> list[Sequence]:
        """Those of `active` that may be prefilled now. Takes the leader's state over where the leader has it."""
        waiting = [s for s in active if s.phase == "prefill" and s.history == s.reused and _follows(s)]
        self._common = {pair: n for pair, n in self._common.items() if pair[0] in waiting}
        ready = []
        for i, sequence in enumerate(active):
            if sequence.phase != "prefill":
                continue
            leader = self._leader(sequence, active[:i]) if sequence in waiting else None
            if leader is None:
                ready.append(sequence)
            elif leader.phase != "prefill":
                self._follow(sequence, leader)
                ready.append(sequence)
        return ready

    def _leader(self, sequence: Sequence, earlier: list[Sequence]) -> Sequence | None:
        best, most = None, sequence.history + self._page_tokens - 1
        for other in earlier:
            if other.phase in ("prefill", "decode", "closing") and self._alike(sequence, other) > most:
                best, most = other, self._alike(sequence, other)
        return best

    def _alike(self, sequence: Sequence, other: Sequence) -> int:
        """Tokens of the prompt that the other's prompt begins with too, as far as its state may be used: not what is composed."""
        agent, its = sequence.agent, other.whole.agent
        assert agent is not None
        assert its is not None
        if its.row.space != agent.row.space or other.whole.course is not None:
            return 0
        if other.table is not None and other.table.approximate:
            return 0
        if (sequence, other) not in self._common:
            most = min(len(sequence.ids) - int(sequence.generate), len(other.ids))
            same = np.equal(sequence.ids[:most], other.ids[:most])
            self._common[sequence, other] = most if same.all() else int(np.argmin(same))
        return self._common[sequence, other]

    def _follow(self, sequence: Sequence, leader: Sequence) -> None:
        assert sequence.table is not None
        assert leader.table is not None
        table = leader.table.fork()
        table.cut(self._alike(sequence, leader))
        table.keeps = sequence.table.keeps
        sequence.table.release()
        sequence.table, sequence.reused, sequence.state_before = table, len(table), "hot"


def _follows(sequence: Sequence) -> bool:
    """One that is composed, or whose past is shortened, goes its own way, and so does one that is to use nothing remembered,
    or that carries state along: no other has passed the place where they part with it at hand."""
    table = sequence.table
    apart = table is not None and (table.approximate or table.carry is not None)
    return sequence.course is None and sequence.reuse != "off" and not apart
