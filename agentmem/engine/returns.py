"""Agents come back: the pages of an admitted request are brought into RAM, and its prefill starts.

Where nobody else is there and much is missing, the prefill starts at once, and each layer waits for its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.engine.memory import Memory
from agentmem.engine.planner import Planner
from agentmem.engine.prefetch import Prefetch
from agentmem.engine.recall import Recall
from agentmem.engine.sequence import Sequence
from agentmem.engine.stream import Stream
from agentmem.errors import AgentMemError, Overloaded


class Host(Protocol):
    """What is needed of the engine. `start` begins the prefill of pages that have slots."""

    active: list[Sequence]
    pool: Pool
    recall: Recall
    prefetch: Prefetch

    @property
    def waiting(self) -> list[Sequence]: ...

    def start(self, sequence: Sequence, stream: Stream | None = None) -> None: ...

    def retry_or_fail(self, sequence: Sequence, error: AgentMemError, again: Callable[[], None]) -> None: ...


class Returns:
    """Engine thread only."""

    def __init__(self, engine: Host, planner: Planner, memory: Memory) -> None:
        self._engine, self._planner, self._memory = engine, planner, memory
        self._next: Sequence | None = None
        self._streaming: tuple[Sequence, Stream] | None = None

    def restore(self, sequence: Sequence, whole: bool = False) -> None:
        """Bring the matched pages into RAM, then start the prefill; with it, unless `whole`, where that is possible."""
        match = sequence.match
        assert match is not None
        missing = [p for p in match.pages if p.slots is None]
        sequence.phase = "restoring"
        if self._engine.prefetch.finish(sequence, lambda: self.restore(sequence)):
            return
        if not whole:
            checkpoint = sequence.past.checkpoint
            own = [p for p in missing if checkpoint is None or p not in checkpoint.pages]
            sequence.restored = sequence.prefetched + sum(p.rows for p in own)
        copied = [p for p in missing[-1:] if p.raw and p is match.pages[-1]]  # by the table, before any pass
        rest = missing[: len(missing) - len(copied)]

        def again() -> None:
            self.restore(sequence)
            sequence.restored += sum(p.rows for p in copied)

        if not missing:
            self._engine.start(sequence)
        elif whole or not self._streams(sequence, rest):
            self._read(sequence, missing, lambda: self._engine.start(sequence))
        elif copied:
            self._read(sequence, copied, again)
        else:
            self._next = sequence

    def _streams(self, sequence: Sequence, pages: list[Page]) -> bool:
        alone = self._engine.active == [sequence] and not self._engine.waiting
        whole = (
            sequence.may_compose
            or sequence.reused == len(sequence.ids)
            or sequence.past.checkpoint is not None
        )
        return alone and not whole and self._engine.recall.streams(pages)

    def _read(self, sequence: Sequence, pages: list[Page], then: Callable[[], None]) -> None:
        """Bring `pages` into RAM; what is damaged is dropped, and the prompt matched anew."""

        def done(bad: dict[int, str], seconds: float) -> None:
            sequence.restore_ms += 1e3 * seconds
            if not bad:
                then()
                return
            self._planner.unpin(sequence)
            self._lose(sequence, bad)

        try:
            self._engine.recall.start(pages, done)
        except Overloaded as error:
            self._engine.retry_or_fail(sequence, error, lambda: self.restore(sequence))

    def _lose(self, sequence: Sequence, bad: dict[int, str]) -> None:
        sequence.lost = True
        self._memory.lose(bad)
        self._planner.replan(sequence)
        self.restore(sequence)

    def begin_stream(self) -> None:
        """Start a prefill whose layers wait for their rows. Until `land`, in the same step, nothing else may use the pages."""
        sequence, self._next = self._next, None
        if sequence is None or sequence.phase != "restoring":
            return
        assert sequence.match is not None
        missing = [p for p in sequence.match.pages if p.slots is None]
        if not self._streams(sequence, missing):
            self.restore(sequence, whole=True)
            return
        try:
            stream = self._engine.recall.stream(missing)
        except Overloaded as error:
            self._engine.retry_or_fail(sequence, error, lambda: self.restore(sequence))
            return
        self._streaming = sequence, stream
        self._engine.start(sequence, stream)

    def land(self) -> None:
        """The step of a stream is over: all of its rows are there now, or the prompt begins anew without what is damaged."""
        if self._streaming is None:
            return
        (sequence, stream), self._streaming = self._streaming, None
        stream.finish()
        sequence.restore_ms += 1e3 * stream.seconds
        if sequence.table is not None:
            sequence.table.stream = None
        if not stream.bad:
            return
        waits = sequence.phase != "done"
        if waits and sequence.table is not None:
            sequence.table.release()
            sequence.table = None
        for page in stream.pages:
            self._engine.pool.evict(page)
        if waits:
            self._lose(sequence, stream.bad)
        else:
            self._memory.lose(stream.bad)
