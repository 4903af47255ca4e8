"""Composed reuse in the engine: prompts that are put together behind their exact prefix, and turns that teach how.

A composed table is private: it never becomes pages. What was exact in front of it does, as after any turn.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from functools import cached_property

from agentmem.compose.blend import can_blend
from agentmem.compose.composer import Composer, Policy, spans_of
from agentmem.compose.rotation import Rotation, rotations
from agentmem.engine.course import Course
from agentmem.engine.lessons import Lessons, read_from_its_beginning
from agentmem.engine.sequence import Sequence
from agentmem.engine.trial import Bench, Prompt
from agentmem.engine.trials import Trials
from agentmem.errors import BadRequest, ModelUnavailable

log = logging.getLogger(__name__)

NO_BLEND = "the layers of this model cannot be run one by one, so it cannot be blended; use another planner"
NO_PAPER = 'planner "paper" needs anchors that are kept in its way; set compose_anchors to "paper", or use another planner'


class Composing:
    """Engine thread only. `make` gives the composer, or why there is none, when it is first asked for: who composes nothing pays
    nothing. `kept`: whether an earlier run has left something on disk. `plain`: whether all layers are plain attention.
    """

    def __init__(
        self, bench: Bench, make: Callable[[], Composer | str], kept: Callable[[], bool] = lambda: False,
        plain: bool = True,
    ) -> None:  # fmt: skip
        self._plain = plain
        self.bench, self._model, self._make, self._kept = bench, bench.model, make, kept
        self.lessons, self.trials = Lessons(), Trials(bench)
        self._random = random.Random()
        self.figures: dict[str, int] = {}

    @cached_property
    def rotations(self) -> list[Rotation]:
        """How each layer turns its keys. Raises ModelUnavailable where that is not known."""
        return rotations(self._model.model)

    @cached_property
    def composer(self) -> Composer | str:
        """The composer, or why there is none."""
        try:
            return self._make() if self.rotations else "the model has no layers"
        except ModelUnavailable as error:
            return error.message
        except Exception:
            log.exception("what composed reuse keeps could not be opened")
            return "see the daemon's log"

    @cached_property
    def blends(self) -> bool:
        """Whether the layers of the model can be run one by one."""
        shapes = [codec.shape for codec in self.bench.pool.geometry.codecs]
        return self._plain and can_blend(self.bench.network, shapes, self._model.dtype)

    @property
    def made(self) -> Composer | None:
        """The composer, if somebody has asked for it."""
        composer = self.__dict__.get("composer")
        return composer if isinstance(composer, Composer) else None

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
        try:
            sequence.content = spans_of(sequence.messages, sequence.ids, self._model.tokenizer)
            if not sequence.generate or len(sequence.ids) - sequence.reused <= 1:
                return
            course = self._course(sequence, self.composer)
        except Exception:
            log.exception("a prompt could not be composed; it is read")
            sequence.notes = ("not composed: see the daemon's log",)
            return
        if course is None:
            read_from_its_beginning(sequence, table)
        else:
            sequence.course, sequence.prefix, table.keeps = course, table.fork(), False

    def _course(self, sequence: Sequence, composer: Composer) -> Course | None:
        assert sequence.agent is not None
        ids, known, row = sequence.ids, sequence.reused, sequence.agent.row
        start, policy = (
            time.perf_counter(),
            Policy(sequence.reuse, sequence.request.planner or sequence.agent.planner),
        )
        if policy.planner == "blend" and not self.blends:
            sequence.notes = (f"not composed: {NO_BLEND}",)
            return None
        found = composer.plan(row.namespace, ids, sequence.content, known, policy, row.name)
        if found is None:
            sequence.notes = (f"not composed: {composer.why_not}",)
            return None
        assert [i for step in found.steps for i in step.ids] == ids[known:]
        sequence.notes, sequence.composed = found.lines, found.composed_tokens
        ms = 1e3 * (time.perf_counter() - start)
        log.info("composed %d of %d tokens, planned in %.0f ms", sequence.composed, len(ids), ms)
        return Course(found.steps, known, found.provenance, found.planner)

    def put(self, sequence: Sequence) -> bool:
        """Put what is next on the sequence's course; whether the model can go on reading. Raises Overloaded when there are no
        slots for it."""
        course, table = sequence.course, sequence.table
        assert course is not None
        assert table is not None
        start = time.perf_counter()
        if not course.put(table, self.rotations, self.bench.network, self._model.dtype):
            sequence.prefill_ms += 1e3 * (time.perf_counter() - start)
            return False
        if course.read_until(len(table)) == course.end:  # what is said from here on may become a segment
            table.keeps = True
        return True

    def check(self, planner: str | None) -> None:
        """Raises BadRequest where nothing can be made so with this model, or with this daemon's settings."""
        if planner == "blend" and not self.blends:
            raise BadRequest(NO_BLEND, param="planner")
        if (
            planner == "paper"
            and isinstance(self.composer, Composer)
            and not self.composer.library.pool.whole
        ):
            raise BadRequest(NO_PAPER, param="planner")

    def gather(self, sequence: Sequence) -> None:
        """The turn is over, and its table soon: keep what may be learned of it. Called again, it does nothing."""
        table, agent = sequence.table, sequence.agent
        assert table is not None
        assert agent is not None
        if not table.keeps or self.made is None:
            return
        table.keeps = False
        if not sequence.prompt_done:
            return
        if sequence.course is not None and self.made.audits(self._random):
            prompt = Prompt(agent.row.namespace, agent.row.name, sequence.ids, sequence.content)
            self.trials.audit(self.made, prompt, sequence.course.planner)
        self.lessons.gather(sequence, self.rotations)

    def rest(self, alone: bool) -> bool:
        """Nobody waits for a token: learn from the turns that are over; when nobody is there at all, go on with a trial.

        Returns whether there was anything to do.
        """
        if self.made is None:
            return False
        worked = self.lessons.teach(self.made) or (
            alone
            and (self.made.prepare() or self.trials.advance(self.made, self.rotations))
            and not self.trials.running
        )
        if worked:
            self.flush()
        return worked or self.trials.running

    def let_go(self) -> None:
        """Somebody is there: hold nothing."""
        self.trials.let_go()

    def forget(self, namespace: str, agent: str) -> None:
        """Forget what no other agent has: in RAM at once, on disk before anything that is written later."""
        if (self.made is not None or self._kept()) and isinstance(self.composer, Composer):
            self.lessons.drop(namespace, agent)
            self.trials.drop(lambda p: (p.namespace, p.agent) == (namespace, agent))
            self.composer.forget(namespace, agent)
            self.flush()

    def flush(self, everything: bool = False) -> None:
        """Hand what has changed to the writer; with `everything`, counters too."""
        if self.made is not None:
            self.figures = self._figures(self.made)
        if self.made is not None and self.made.keeping is not None:
            self.made.keeping.flush(everything)

    def _figures(self, composer: Composer) -> dict[str, int]:
        """What is kept in RAM, for any thread."""
        library = composer.library
        return {
            "segment_bytes": library.nbytes,
            "segments": sum(len(space.segments) for space in library.spaces.values()),
            "anchor_bytes": library.pool.nbytes,
            "anchors": len(library.pool),
            "dropped_turns": self.lessons.dropped,
        }

    def close(self) -> None:
        """Precondition: nothing is written any more."""
        self.trials.drop()
        if self.made is not None and self.made.keeping is not None:
            self.made.keeping.keep.close()
