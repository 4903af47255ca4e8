"""The lobby: requests that wait to be admitted, and what is turned away at the door."""

from __future__ import annotations

from collections.abc import Hashable

from agentmem.engine.background import others
from agentmem.engine.memory import Memory
from agentmem.engine.pace import Pace
from agentmem.engine.scheduler import Scheduler
from agentmem.engine.sequence import Sequence
from agentmem.errors import Overloaded

LEAST_WAIT_MS, UNKNOWN_WAIT_MS, LONGEST_RETRY_MS = 50, 1000, 60_000
LETTERS = 4
"""Letters of a token, about: only to tell small requests from large ones before they are rendered."""


class Lobby:
    """Engine thread only, except `check`."""

    def __init__(
        self, scheduler: Scheduler[Sequence], memory: Memory, *, queue_limit: int, max_wait_ms: float, max_batch: int
    ) -> None:  # fmt: skip
        self.waiting: list[Sequence] = []
        self._scheduler, self._memory = scheduler, memory
        self._queue_limit, self._max_wait_ms, self._max_batch = queue_limit, max_wait_ms, max_batch

    @property
    def pace(self) -> Pace:
        return self._scheduler.pace

    def check(self, arriving: int, active: int) -> None:
        """Raises Overloaded when one more request would find the queue full, or is predicted to wait too long. Any thread.

        Clients are told to come back when a place is free, as fast as turns ended so far.
        """
        waiting = others(list(self.waiting)) + arriving
        beside = active if waiting and active else self._max_batch
        step = self.pace.wait_ms(1, beside)
        if waiting >= self._queue_limit:
            raise Overloaded(f"{self._queue_limit} requests are waiting already", retry_after_ms=_retry(step))
        wait = step * (waiting + 1) if waiting or active >= self._max_batch else 0.0
        if wait > self._max_wait_ms:
            raise Overloaded(
                f"{waiting} requests are waiting already; one more would wait about {wait / 1e3:.0f} s",
                retry_after_ms=_retry(max(step, wait - self._max_wait_ms)),
            )

    def add(self, sequence: Sequence) -> None:
        """A request arrived. How long its prompt is shows when it is rendered; until then, by what it adds to what is known."""
        request = sequence.request
        agent = self._memory.agent(request.namespace, request.agent)
        session = agent.sessions.get(request.session) if agent is not None else None
        letters = _letters(request.messages)
        if session is not None and request.history == "client":
            letters -= _letters(session.conversation.messages)
        sequence.guess = max(1, letters // LETTERS)
        self.waiting.append(sequence)

    def ordered(self, candidates: list[Sequence]) -> list[Sequence]:
        """Who of those that wait may be admitted now, the first first: of each session the request that came first, if none of
        it runs."""
        first: dict[Hashable, Sequence] = {}
        for sequence in candidates:
            first.setdefault((*sequence.agent_key, sequence.request.session), sequence)
        return self._scheduler.waiting([s for s in first.values() if not self._busy(s)])

    def _busy(self, sequence: Sequence) -> bool:
        """True while another turn of the same session runs."""
        known = self._memory.agent(sequence.request.namespace, sequence.request.agent)
        session = known.sessions.get(sequence.request.session) if known is not None else None
        return session is not None and session.busy

    def must_be_next(self, sequence: Sequence) -> bool:
        """Whether nobody may be admitted before this one, which does not fit yet."""
        return self._scheduler.must_be_next(sequence)

    def admitted(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self._scheduler.admitted(sequence)


def _letters(messages: list[dict[str, object]]) -> int:
    return sum(len(str(m.get("content") or "")) for m in messages)


def _retry(ms: float) -> int:
    return round(min(max(ms, LEAST_WAIT_MS), LONGEST_RETRY_MS)) if ms else UNKNOWN_WAIT_MS
