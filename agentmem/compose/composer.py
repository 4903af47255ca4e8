"""The composer: what of a prompt need not be read, and what a prompt that was read teaches. Engine thread only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agentmem.compose.anchors import BASE_BITS
from agentmem.compose.assembly import Assembly, Layout, TooLittle, segment_of
from agentmem.compose.blend import MOST, blended
from agentmem.compose.declared import cut
from agentmem.compose.keeping import Keeping
from agentmem.compose.ledger import Case, Ledger
from agentmem.compose.lesson import Lesson, Look
from agentmem.compose.library import CONSUMER, Library
from agentmem.compose.packed import PackedState
from agentmem.compose.planners import Blend, Kvcomm, Put, Steps
from agentmem.compose.policy import DEFAULT, Policy
from agentmem.compose.recognise import FIXED, SHORTEST, Span, parts_of, spans_of
from agentmem.compose.segment import EXACT, Provenance, Segment
from agentmem.compose.ways import way
from agentmem.model.chat import ChatTokenizer

__all__ = ["EXACT", "Composer", "Composition", "Policy", "Provenance", "Span", "spans_of"]


AUDIT_SHARE = 0.02


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
        """Tokens that keep state from elsewhere."""
        put = sum(len(s.ids) for s in self.steps if isinstance(s, Put))
        return put + sum(len(s.ids) - s.anew for s in self.steps if isinstance(s, Blend))

    @property
    def read_tokens(self) -> int:
        return sum(len(s.ids) for s in self.steps) - self.composed_tokens


class Composer:
    """Plans over one library. `why_not` says why the last plan was none. Without a tokenizer nothing can be declared.

    What it learns reaches the disk with `keeping.flush()`, which may wait until nobody does.
    """

    def __init__(
        self, library: Library, tokenizer: ChatTokenizer | None = None, ledger: Ledger | None = None,
        keeping: Keeping | None = None, audit_share: float = AUDIT_SHARE,
    ) -> None:  # fmt: skip
        self.library, self.keeping = library, keeping
        self.ledger = ledger or Ledger()
        self.audit_share = audit_share
        self.why_not = ""
        self._tokenizer = tokenizer

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
        if policy.planner == "paper" and not self.library.pool.whole:
            self.why_not = "anchors are kept in another way than the paper's"
            return None
        if policy.planner == "blend" and len(ids) > MOST:
            self.why_not = f"prompts of more than {MOST} tokens are not blended"
            return None
        layout = self._layout(namespace, ids, spans)
        if policy.reuse == "auto":
            self.why_not = self.ledger.why_not(namespace, layout.template, policy.planner)
            if self.why_not:
                self.why_not += "" if policy.planner == DEFAULT else f" (planner {policy.planner})"
                return None
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
        if planner == "blend":
            steps = blended(steps)
            made.lines += [f"{s.anew} of these tokens read anew" for s in steps if isinstance(s, Blend)]
        composition = Composition(
            steps, layout.template, tuple(made.lines), planner, Provenance.composed(made.used)
        )
        if composition.composed_tokens < SHORTEST:
            self.why_not = "nothing in this prompt is known from elsewhere"
            return None
        assert [i for step in steps for i in step.ids] == layout.ids[known:].tolist()
        self._note(layout, agent)
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
            layout = self._layout(namespace, ids, spans)
            Lesson(self.library, layout, state, agent, in_use).teach()
            self._note(layout, agent)

    def prepare(self) -> bool:
        """Compute now, for one slot with new anchors, what its next prompt asks for; returns whether there was one."""
        if not self.library.fresh:
            return False
        name, planner = self.library.fresh.pop(), Kvcomm(self.library.pool, CONSUMER)
        if len(self.library.pool.of_slot(name)) >= planner.minimum:
            planner.prepare(name)
        return True

    def audits(self, rng: random.Random) -> bool:
        """Whether to run this composed prompt densely too, when nobody waits."""
        return rng.random() < self.audit_share

    def rebuilt(self, namespace: str, template: bytes, case: Case) -> tuple[list[int], list[Span]] | None:
        """The prompt of a case, with spans; None where one of its texts is not known any more."""
        entry = self.ledger.entries.get((namespace, template))
        segments = [self.library.segment(namespace, text) for text in case]
        if entry is None or len(entry.fixed) != len(case) + 1:
            return None
        ids, spans = list(entry.fixed[0]), []
        for segment, fixed in zip(segments, entry.fixed[1:], strict=True):
            if segment is None:
                return None
            spans.append(Span(len(ids), len(ids) + len(segment.ids), segment.kind))
            ids += [*segment.ids.tolist(), *fixed]
        return ids, spans

    def forget(self, namespace: str, agent: str | None = None) -> None:
        """Forget what no other agent has, in RAM now and on disk with the next flush."""
        self.library.forget(namespace, agent)
        self.ledger.forget(namespace, agent)

    def _note(self, layout: Layout, agent: str) -> None:
        """Write a prompt down as a case to measure on, if all its texts are kept."""
        slots = [(n, p) for n, p in enumerate(layout.parts) if p.is_slot and layout.behind(n) is not None]
        found = [segment_of(self.library, layout, p) for _, p in slots]
        case = tuple(f[0].text for f in found if f is not None)
        if case and len(case) == len(slots):
            fixed = (layout.tokens(p) for p in layout.parts if p.kind == FIXED)
            self.ledger.saw(layout.namespace, layout.template, fixed, case, agent)

    def _keep_reply(
        self, namespace: str, ids: np.ndarray, spans: Sequence[Span], state: Look, provenance: Provenance,
        agent: str,
    ) -> None:  # fmt: skip
        reply = max(spans, key=lambda s: s.start, default=None)
        if reply is None or reply.kind != "assistant":
            return
        base = PackedState.of(state(reply.start, reply.stop), BASE_BITS)
        segment = Segment(ids[reply.start : reply.stop], base, kind=reply.kind, provenance=provenance)
        self.library.put(namespace, segment, agent)

    def _layout(self, namespace: str, ids: Sequence[int], spans: Sequence[Span]) -> Layout:
        tokens, space = np.asarray(ids, dtype=np.int32), self.library.space(namespace)
        if space.templates and self._tokenizer is not None:
            spans = cut(ids, spans, space.templates, self._tokenizer)
        return Layout.of(namespace, tokens, parts_of(tokens, spans, space.texts))
