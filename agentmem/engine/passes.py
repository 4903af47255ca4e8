"""The passes of one step, and what becomes of the sequences for which one fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from agentmem.engine.draw import Chosen
from agentmem.engine.pace import Pace
from agentmem.engine.runner import Chunk, Runner, Work
from agentmem.engine.sequence import Sequence
from agentmem.engine.stream import StreamBroken
from agentmem.errors import AgentMemError, Overloaded, reported

log = logging.getLogger(__name__)

Outcome = tuple[Sequence, list[Chosen]]


class Passes:
    """Engine thread only. `fail` ends a request with an error; `wait` keeps one for later that finds no slots now."""

    def __init__(
        self, runner: Runner, pace: Pace, fail: Callable[[Sequence, AgentMemError], None],
        wait: Callable[[Sequence, AgentMemError, Callable[[], None]], None],
    ) -> None:  # fmt: skip
        self.runner, self.pace = runner, pace
        self._fail, self._wait = fail, wait

    def run(self, work: Work) -> list[Outcome]:
        """One pass for all that decode, and one for the chunks of prompts; the tokens that were chosen."""
        reserved = [s for s in work.decoding if self._reserve(s)]
        ready = [s for s in reserved if s.phase != "done"]
        return [*self._decode(ready), *self._prefill(work.chunks)]

    def _reserve(self, sequence: Sequence) -> bool:
        """Whether the sequence has the slots for its next token; else it waits for a step in which it has."""
        if sequence.phase == "done":  # another reply to its prompt has failed
            return False
        assert sequence.table is not None
        try:
            sequence.table.reserve()
        except Overloaded as error:
            self._wait(sequence, error, lambda: None)
            return False
        return True

    def _decode(self, sequences: list[Sequence]) -> list[Outcome]:
        """A step of the whole batch; when it fails, of each alone, so that only those fail that must.

        Who has been fed its token already cannot be fed it again.
        """
        if not sequences:
            self.runner.rest()
            return []
        start, before = time.perf_counter(), [s.history for s in sequences]
        try:
            drawn = self.runner.decode(sequences)
        except Exception as error:
            fed = [s for s, n in zip(sequences, before, strict=True) if s.history != n]
            for sequence in fed if len(sequences) > 1 else sequences:
                self._fail(sequence, reported(error))
            if len(sequences) > 1:
                log.warning("a decode step of %d sequences failed: %s", len(sequences), error)
            return [outcome for s in sequences if s.phase != "done" for outcome in self._decode([s])]
        self.pace.decoded(len(sequences), 1e3 * (time.perf_counter() - start))
        outcomes: list[Outcome] = []
        for sequence, chosen in drawn:
            if isinstance(chosen, Exception):
                self._fail(sequence, reported(chosen))
            else:
                outcomes.append((sequence, chosen))
        return outcomes

    def _prefill(self, chunks: list[Chunk]) -> list[Outcome]:
        """A pass over chunks of prompts; when it fails, over each alone."""
        if not chunks:
            return []
        if len(chunks) > 1 and not self.runner.packs:
            return [outcome for chunk in chunks for outcome in self._prefill([chunk])]
        sequences, start = [s for s, _ in chunks], time.perf_counter()
        parts = [(len(tokens), s.history) for s, tokens in chunks]
        try:
            chosen = self.runner.prefill(chunks)
        except Exception as error:
            if len(chunks) > 1:
                return [outcome for chunk in chunks for outcome in self._prefill([chunk])]
            if isinstance(error, StreamBroken):  # who began the stream sees to it
                return []
            if isinstance(error, Overloaded):
                self._wait(sequences[0], error, lambda: None)
            else:
                self._fail(sequences[0], reported(error))
            return []
        ms = 1e3 * (time.perf_counter() - start)
        self.pace.prefilled(parts, ms)
        for sequence in sequences:
            sequence.prefill_ms += ms
        return list(zip(sequences, chosen, strict=True))
