"""Prefetch: pages of requests that wait are read from disk while others decode."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several

from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.engine.memory import Agent, Memory, Session
from agentmem.engine.recall import Recall
from agentmem.engine.sequence import Sequence

Foreseen = Callable[[Sequence, Agent, Session], list[Page]]

PIECE_BYTES = 32 << 20
"""What is read at once: a restore that somebody waits for comes after no more than this."""


class Prefetch:
    """Reads ahead the state that the sessions of waiting requests end with. Engine thread only.

    It takes free slots only, and no more than are left when all that run and all that wait before a request have what they can
    need at most: nothing is evicted for it, and nothing that it holds is missed by others. What was read stays pinned until its
    request is admitted or gone; a read that has begun goes on to its end.
    """

    def __init__(self, pool: Pool, memory: Memory, recall: Recall, foreseen: Foreseen) -> None:
        """`foreseen`: the pages that a request of a session is likely to start from."""
        self._pool, self._memory, self._recall, self._foreseen = pool, memory, recall, foreseen
        self._pinned: dict[Sequence, list[Page]] = {}
        self._complete: set[Sequence] = set()
        self._reading: Sequence | None = None
        self._after: Callable[[], None] | None = None
        self.requests = 0
        self.pages = 0

    def advance(self, waiting: Several[Sequence], need: Callable[[Sequence], int], room: int) -> None:
        """Read on for the first of `waiting`, in the order of their admission, that has pages to read.

        `need` is what a request may take in slots at most, `room` the slots that nobody who runs can need.
        """
        for sequence in [s for s in self._pinned if s not in waiting or s.ticket.cancelled]:
            self.release(sequence)
        self._complete &= set(waiting)
        if self._recall.running:
            return
        for sequence in waiting:
            room -= need(sequence)
            if room < 0:
                return
            if sequence not in self._complete and not sequence.ticket.cancelled and self._read(sequence):
                return

    def _read(self, sequence: Sequence) -> bool:
        """Start to read the next piece of what is missing; returns whether there is one."""
        pages = self._missing(sequence)
        if not pages:
            self._complete.add(sequence)
            return False
        if sequence not in self._pinned:
            self._pinned[sequence] = []
            self.requests += 1
        self._pool.pin(pages)
        self._reading = sequence

        def done(bad: dict[int, str], _: float) -> None:
            self._reading = None
            if bad:
                self._complete.add(sequence)
                self._pool.unpin(pages)
                self.release(sequence)
                self._memory.lose(bad)
            else:
                sequence.prefetched += sum(p.rows for p in pages)
                self.pages += len(pages)
                if sequence in self._pinned:
                    self._pinned[sequence] += pages
                else:
                    self._pool.unpin(pages)
            after, self._after = self._after, None
            if after is not None:
                after()

        self._recall.start(pages, done)
        return True

    def _missing(self, sequence: Sequence) -> list[Page]:
        """The first pages of the session's state that are on disk only, as many as a piece and the free slots hold."""
        request, g = sequence.request, self._pool.geometry
        agent = self._memory.agent(request.namespace, request.agent)
        session = agent.sessions.get(request.session) if agent is not None else None
        if agent is None or session is None or session.head is None or session.busy:
            return []
        room = min(self._pool.slots.free, max(1, PIECE_BYTES // g.slot_bytes))
        pages: list[Page] = []
        for page in self._foreseen(sequence, agent, session):
            if page.slots is None and page.pieces is not None:
                room -= g.slots_for(page.raw, page.rows)
                if room < 0:
                    break
                pages.append(page)
        return pages

    def release(self, sequence: Sequence) -> None:
        """The request was admitted and has pinned what it uses, or it is gone. Pages that are being read stay pinned."""
        self._pool.unpin(self._pinned.pop(sequence, []))

    def release_all(self) -> bool:
        """Somebody who runs finds no slots: give back what only waits. Returns whether there was anything."""
        held = any(self._pinned.values())
        for sequence in list(self._pinned):
            self.release(sequence)
            self._complete.add(sequence)
        return held

    def let_go(self, agent: tuple[str, str]) -> bool:
        """An agent's pages are to be moved or deleted: hold none for its requests; False while some are being read."""
        for sequence in [s for s in self._pinned if s.agent_key == agent]:
            self.release(sequence)
            self._complete.add(sequence)
        return self._reading is None or self._reading.agent_key != agent

    def finish(self, sequence: Sequence, then: Callable[[], None]) -> bool:
        """Call `then` once the piece that is being read for `sequence` is there; False when none is."""
        if self._reading is not sequence:
            return False
        self._after = then
        return True
