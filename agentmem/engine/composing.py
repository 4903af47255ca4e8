"""Composed reuse in the engine: prompts that are put together behind their exact prefix, and what turns teach the composer.

A composed table is private: it never becomes pages. What was exact in front of it does, as after any turn.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from agentmem.compose.composer import EXACT, Composer, Policy, Provenance, Reuse, Span, spans_of
from agentmem.compose.rotation import Rotation, rotations
from agentmem.engine.capture import Capture
from agentmem.engine.course import Course
from agentmem.engine.sequence import Sequence
from agentmem.engine.table import Table
from agentmem.errors import ModelUnavailable
from agentmem.model.loaded import LoadedModel

log = logging.getLogger(__name__)

AGAIN = 64
"""Tokens at most that are read again so that a text is learned whole."""
PENDING = 4
"""Turns that wait to be learned from, at most: each holds its rows in 16 bits."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A turn to learn from: its ids with those of the reply, and what was computed of them."""

    namespace: str
    agent: str
    ids: list[int]
    spans: list[Span]
    capture: Capture
    provenance: Provenance


class Composing:
    """Engine thread only. `make` gives the composer when it is first asked for, so that who composes nothing pays nothing; or why
    there is none."""

    def __init__(self, model: LoadedModel, make: Callable[[], Composer | str]) -> None:
        self._model, self._make = model, make
        self._lessons: deque[Lesson] = deque()
        self.composed_tokens = 0
        self.dropped = 0

    @cached_property
    def rotations(self) -> list[Rotation] | str:
        """How each layer turns its keys, or why that is not known."""
        try:
            return rotations(self._model.model)
        except ModelUnavailable as error:
            return error.message

    @cached_property
    def composer(self) -> Composer | str:
        """The composer, or why there is none."""
        if isinstance(self.rotations, str):
            return self.rotations
        return self._make()

    @property
    def _known_rotations(self) -> list[Rotation]:
        assert isinstance(self.rotations, list)
        return self.rotations

    def plan(self, sequence: Sequence) -> None:
        """The table holds the exact prefix: give the sequence a course for the rest, if there is one.

        A prompt that cannot be composed is read, and teaches.
        """
        table = sequence.table
        assert table is not None
        if not sequence.may_compose:
            return
        if isinstance(self.composer, str):
            sequence.notes = (f"not composed: {self.composer}",)
            return
        table.keeps = True
        left = len(sequence.ids) - sequence.reused
        if not sequence.generate or left <= 1:
            return
        try:
            course = self._course(sequence, self.composer)
        except Exception:
            log.exception("a prompt could not be composed; it is read")
            sequence.notes = ("not composed: see the daemon's log",)
            return
        if course is not None:
            sequence.course, sequence.prefix, table.keeps = course, table.fork(), False
        else:
            _read_from_its_beginning(sequence, table)

    def _course(self, sequence: Sequence, composer: Composer) -> Course | None:
        start = time.perf_counter()
        sequence.content = spans_of(sequence.messages, sequence.ids, self._model.tokenizer)
        assert sequence.agent is not None
        ids, known = sequence.ids, sequence.reused
        row = sequence.agent.row
        policy = Policy(Reuse(sequence.reuse))
        found = composer.plan(row.namespace, ids, sequence.content, known, policy, row.name)
        if found is None:
            sequence.notes = (f"not composed: {composer.why_not}",)
            return None
        assert [i for step in found.steps for i in step.ids] == ids[known:]
        sequence.notes, sequence.composed = found.lines, found.composed_tokens
        self.composed_tokens += sequence.composed
        ms = 1e3 * (time.perf_counter() - start)
        log.info("composed %d of %d tokens, planned in %.0f ms", sequence.composed, len(ids), ms)
        return Course(found.steps, known, found.provenance)

    def put(self, sequence: Sequence) -> None:
        """Put what is next on the sequence's course. Raises Overloaded when there are no slots for it."""
        course, table = sequence.course, sequence.table
        assert course is not None
        assert table is not None
        course.put(table, self._known_rotations, self._model.dtype)
        if course.read_until(len(table)) == course.end:  # what is said from here on may become a segment
            table.keeps = True

    def gather(self, sequence: Sequence) -> None:
        """The turn is over, and its table soon: keep what may be learned of it."""
        table = sequence.table
        assert table is not None
        if not table.keeps:
            return
        table.keeps = False
        agent, reply = sequence.agent, sequence.reply
        assert agent is not None
        if not agent.persist or agent.encrypted != "off" or not sequence.prompt_done:
            return
        first = len(sequence.ids) if sequence.course is not None else 0
        capture = Capture(table, self._known_rotations, first)
        said = reply.tokens[: len(table) - len(sequence.ids)] if reply is not None else []
        spans = list(sequence.content)
        if said:
            spans.append(Span(len(sequence.ids), len(sequence.ids) + len(said), "assistant"))
        if len(self._lessons) == PENDING:
            self._lessons.popleft()
            self.dropped += 1
        provenance = EXACT if sequence.course is None else sequence.course.provenance
        ids = [*sequence.ids, *said]
        self._lessons.append(Lesson(agent.row.namespace, agent.row.name, ids, spans, capture, provenance))

    def learn(self) -> bool:
        """Nobody waits for a token: learn from the turns that are over. Returns whether there were any."""
        learned = bool(self._lessons)
        while self._lessons:
            lesson = self._lessons.popleft()
            try:
                self._learn(lesson)
            except Exception:
                log.exception("nothing could be learned from a turn")
        return learned

    def _learn(self, lesson: Lesson) -> None:
        assert not isinstance(self.composer, str)
        state, provenance = lesson.capture.state, lesson.provenance
        self.composer.learn(lesson.namespace, lesson.ids, lesson.spans, state, provenance, lesson.agent)


def _read_from_its_beginning(sequence: Sequence, table: Table) -> None:
    """A text whose first tokens are known, as beginnings often are, is read whole, so that all of it is there in 16 bits."""
    begun = next((s for s in sequence.content if s.start < sequence.reused < s.stop), None)
    if begun is not None and sequence.reused - begun.start <= AGAIN:
        table.cut(begun.start)
        sequence.reused = begun.start
