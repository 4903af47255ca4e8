"""What turns teach the composer, learned when nobody waits for a token."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from agentmem.compose.composer import EXACT, Composer, Provenance, Span
from agentmem.compose.rotation import Rotation
from agentmem.engine.capture import Capture
from agentmem.engine.sequence import Sequence
from agentmem.engine.table import Table

log = logging.getLogger(__name__)

AGAIN = 64
"""Tokens at most that are read again so that a text is learned whole."""
PENDING = 4
"""Turns that wait to be learned from, at most: each holds its rows in 16 bits."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A turn that is over: its ids with those of the reply, and what was computed of them."""

    turn: Sequence
    namespace: str
    agent: str
    ids: list[int]
    spans: list[Span]
    capture: Capture
    provenance: Provenance


class Lessons:
    """Engine thread only. `dropped` counts turns that nothing was learned from, because others came too fast."""

    def __init__(self) -> None:
        self._waiting: deque[Lesson] = deque()
        self.dropped = 0

    def gather(self, sequence: Sequence, rotations: list[Rotation]) -> None:
        """Take what may be learned of a turn that is over out of its table. Of a composed prompt that is the reply."""
        table, agent = sequence.table, sequence.agent
        reply, prompt = sequence.reply, len(sequence.ids)
        assert table is not None
        assert agent is not None
        said = reply.tokens[: len(table) - prompt] if reply is not None else []
        spans = [*sequence.content, *([Span(prompt, prompt + len(said), "assistant")] if said else [])]
        course = sequence.course
        capture = Capture(table, rotations, prompt if course is not None else 0)
        provenance = course.provenance if course is not None else EXACT
        if len(self._waiting) == PENDING:
            self._waiting.popleft()
            self.dropped += 1
        ids = [*sequence.ids, *said]
        row = agent.row
        self._waiting.append(Lesson(sequence, row.namespace, row.name, ids, spans, capture, provenance))

    def drop(self, namespace: str, agent: str) -> None:
        """Learn nothing of what this agent has said."""
        kept = [x for x in self._waiting if (x.namespace, x.agent) != (namespace, agent)]
        self._waiting = deque(kept)

    def teach(self, composer: Composer) -> bool:
        """Learn from all turns whose clients have had the end; returns whether there were any."""
        over = [lesson for lesson in self._waiting if lesson.turn.reported]
        self._waiting = deque(lesson for lesson in self._waiting if not lesson.turn.reported)
        for lesson in over:
            try:
                composer.learn(
                    lesson.namespace, lesson.ids, lesson.spans, lesson.capture.state, lesson.provenance, lesson.agent
                )  # fmt: skip
            except Exception:
                log.exception("nothing could be learned from a turn")
        return bool(over)


def read_from_its_beginning(sequence: Sequence, table: Table) -> None:
    """A text whose first tokens are known, as beginnings often are, is read whole, so that all of it is there in 16 bits."""
    begun = next((s for s in sequence.content if s.start < sequence.reused < s.stop), None)
    if begun is not None and sequence.reused - begun.start <= AGAIN:
        table.cut(begun.start)
        sequence.reused = begun.start
