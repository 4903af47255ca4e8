"""The composer: what of a prompt need not be read, and what a prompt that was read teaches. Engine thread only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agentmem.compose.anchors import BASE_BITS
from agentmem.compose.assembly import Assembly, Layout, TooLittle
from agentmem.compose.lesson import SMALLEST, Lesson, Look
from agentmem.compose.library import Library
from agentmem.compose.planners import Put, Read, Steps
from agentmem.compose.policy import DEFAULT, Policy, Reuse
from agentmem.compose.recognise import SHORTEST, Span, parts_of, spans_of
from agentmem.compose.segment import EXACT, Provenance, Segment
from agentmem.compose.state import PackedState
from agentmem.compose.ways import way

__all__ = ["EXACT", "Composer", "Composition", "Policy", "Provenance", "Reuse", "Span", "spans_of"]


@dataclass(frozen=True, slots=True)
class Composition:
    """How to make a prompt behind its known tokens: `steps`, the last of which is a Read.

    template: of the whole prompt. lines: what explains it. provenance: of what is said behind it.
    """

    steps: Steps
    template: bytes
    lines: tuple[str, ...]
    planner: str = DEFAULT
    provenance: Provenance = EXACT

    @property
    def composed_tokens(self) -> int:
        return sum(len(s.ids) for s in self.steps if isinstance(s, Put))

    @property
    def read_tokens(self) -> int:
        return sum(len(s.ids) for s in self.steps if isinstance(s, Read))


class Composer:
    """Plans over one library. `why_not` says why the last plan was none."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.why_not = ""

    def plan(
        self, namespace: str, ids: Sequence[int], spans: Sequence[Span], known: int, policy: Policy,
        agent: str = "",
    ) -> Composition | None:  # fmt: skip
        """How to make this prompt; None: read it densely.

        known: leading tokens whose state is in the exact store, fewer than all.
        """
        if not policy.composes:
            self.why_not = f"the policy is {policy.reuse}"
            return None
        assert 0 <= known < len(ids)
        layout = self._layout(namespace, ids, spans)
        self.library.clock += 1
        return self._composed(layout, known, policy, policy.planner, agent)

    def _composed(
        self, layout: Layout, known: int, policy: Policy, planner: str, agent: str
    ) -> Composition | None:
        made = Assembly(self.library, layout, way(planner, self.library.pool, policy), policy, known, agent)
        try:
            steps = made.steps()
        except TooLittle as e:
            if policy.fallback == "dense" or planner == policy.fallback:
                self.why_not = str(e)
                return None
            return self._composed(layout, known, policy, policy.fallback, agent)
        composition = Composition(
            steps, layout.template, tuple(made.lines), planner, Provenance.composed(made.used)
        )
        if composition.composed_tokens < SHORTEST:
            self.why_not = "nothing in this prompt is known from elsewhere"
            return None
        assert [i for step in steps for i in step.ids] == layout.ids[known:].tolist()
        return composition

    def learn(
        self, namespace: str, ids: Sequence[int], spans: Sequence[Span], state: Look, provenance: Provenance,
        agent: str = "",
    ) -> None:  # fmt: skip
        """Take in a prompt, its reply as the last span. `state(start, stop)` is what these tokens are in this very run.

        A run that was read teaches all that is new in it; of a composed one only the reply is kept, as composed.
        """
        tokens = np.asarray(ids, dtype=np.int32)
        self.library.clock += 1
        with self.library.using() as in_use:
            if not provenance.exact:
                self._keep_reply(namespace, tokens, spans, state, provenance, agent)
                return
            Lesson(self.library, self._layout(namespace, ids, spans), state, agent, in_use).teach()

    def _keep_reply(
        self, namespace: str, ids: np.ndarray, spans: Sequence[Span], state: Look, provenance: Provenance,
        agent: str,
    ) -> None:  # fmt: skip
        reply = max(spans, key=lambda s: s.start, default=None)
        if reply is None or reply.kind != "assistant" or reply.stop - reply.start < SMALLEST:
            return
        base = PackedState.of(state(reply.start, reply.stop), BASE_BITS)
        segment = Segment(ids[reply.start : reply.stop], base, kind=reply.kind, provenance=provenance)
        self.library.put(namespace, segment, agent)

    def _layout(self, namespace: str, ids: Sequence[int], spans: Sequence[Span]) -> Layout:
        tokens = np.asarray(ids, dtype=np.int32)
        return Layout.of(namespace, tokens, parts_of(tokens, spans, self.library.space(namespace).texts))
