"""Any order of learning, composing, forgetting and restarting: budgets hold, and composed state never passes for exact."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from agentmem.blockpool.files import Files
from agentmem.blockpool.keep import MARGIN, Keep
from agentmem.compose.composer import EXACT, Composer, Policy, Provenance, Span
from agentmem.compose.keeping import Keeping
from agentmem.compose.ledger import Ledger, Pair
from agentmem.compose.library import Library
from agentmem.compose.packed import PackedState
from agentmem.compose.planners import Read
from agentmem.compose.reuse import REUSES
from agentmem.compose.segment import Segment, text_hash
from agentmem.compose.state import State
from tests.compose.test_offsets import drawn

AGENTS, NAMESPACES = ("solver", "analyst", "judge"), ("home", "home/inner")
TEXTS = [np.random.default_rng(n).integers(10, 99, 16 + 4 * n % 12).astype(np.int32) for n in range(5)]
"""The last two are only ever said behind composed state, but may be heard by others afterwards."""
READ, SAID = st.integers(0, 2), st.integers(3, 4)
ONE = PackedState.of(drawn(20, 0), 8).nbytes
BUDGET, ANCHORS, DISK = 5 * ONE, 6 * ONE, 12 * (ONE + MARGIN)

agents, namespaces = st.sampled_from(AGENTS), st.sampled_from((*NAMESPACES[:1] * 3, *NAMESPACES))
fillings = st.lists(st.sampled_from((0, 0, 1, 1, 2, 3, 4)), min_size=1, max_size=2)
REUSE = ("composed", "composed", "composed", *REUSES)
policies = st.builds(
    Policy, st.sampled_from(REUSE), st.sampled_from(("kvcomm+tail", "kvcomm", "lego")),
    st.sampled_from(("dense", "lego")), st.integers(0, 1), st.just(1),
)  # fmt: skip


class Home(RuleBasedStateMachine):
    """One library over its restarts. `read`: marks of state that was read whole; `made`: of state behind composed state."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.read: set[bytes] = set()
        self.made: set[bytes] = set()
        self.count = 0
        self._open()

    def _open(self) -> None:
        library, ledger = Library(BUDGET, ANCHORS, per_slot=3), Ledger()
        self.keep = Keep(self.folder, "tiny", DISK, Files(durable=False))
        self.keeping = Keeping(library, ledger, self.keep)
        self.keeping.restore()
        self.composer = Composer(library, ledger=ledger, keeping=self.keeping)

    def _prompt(
        self, agent: str, filling: list[int], reply: int | None
    ) -> tuple[list[int], list[Span], State]:
        """Texts between fixed ids that are the agent's, and the state of all of it, new each time."""
        ids, spans = [200 + AGENTS.index(agent)] * 3, []
        for number in filling:
            spans.append(Span(len(ids), len(ids) + len(TEXTS[number]), "user"))
            ids += [*TEXTS[number].tolist(), 100, 101]
        if reply is not None:
            spans.append(Span(len(ids), len(ids) + len(TEXTS[reply]), "assistant"))
            ids += TEXTS[reply].tolist()
        self.count += 1
        return ids, spans, drawn(len(ids), self.count)

    @rule(agent=agents, namespace=namespaces, filling=fillings, reply=READ)
    def learn(self, agent: str, namespace: str, filling: list[int], reply: int) -> None:
        ids, spans, state = self._prompt(agent, filling, reply)
        self.read |= {_mark(ids, state, s) for s in spans}
        self.composer.learn(namespace, ids, spans, lambda a, b: state[a:b], EXACT, agent)
        for span in spans:
            segment = self._segment(namespace, ids, span)
            assert segment is None or segment.provenance.exact
            assert segment is None or agent in segment.owners

    @rule(
        agent=agents, namespace=namespaces, filling=fillings, reply=SAID,
        policy=policies, known=st.sampled_from((0, 0, 3, 9, 25)), taught=st.booleans(),
    )  # fmt: skip
    def compose(
        self, agent: str, namespace: str, filling: list[int], reply: int, policy: Policy, known: int,
        taught: bool,
    ) -> None:  # fmt: skip
        """`taught`: others have read these texts before, and so has this agent."""
        if taught:
            self.learn(next(a for a in AGENTS if a != agent), namespace, filling, 0)
            self.learn(agent, namespace, filling, 0)
        ids, spans, _ = self._prompt(agent, filling, None)
        known = min(known, len(ids) - 1)
        before = {t: s.mark for t, s in self.composer.library.space(namespace).segments.items()}
        made = self.composer.plan(namespace, ids, spans, known, policy, agent)
        if made is None:
            return
        assert policy.composes
        assert [i for s in made.steps for i in s.ids] == ids[known:]
        assert isinstance(made.steps[-1], Read)
        assert made.provenance.hops >= 1
        for text in made.provenance.parents:
            used = self.composer.library.segment(namespace, text)
            assert used is not None
            assert used.provenance.hops <= policy.hops
        assert {t: s.mark for t, s in self.composer.library.space(namespace).segments.items()} == before
        self._hear(agent, namespace, filling, reply, made.provenance)

    def _hear(
        self, agent: str, namespace: str, filling: list[int], reply: int, provenance: Provenance
    ) -> None:
        """A reply behind a composed prompt."""
        ids, spans, state = self._prompt(agent, filling, reply)
        self.made.add(_mark(ids, state, spans[-1]))
        anchors = len(self.composer.library.pool)
        self.composer.learn(namespace, ids, spans, lambda a, b: state[a:b], provenance, agent)
        assert len(self.composer.library.pool) == anchors, "composed state makes no anchors"

    @rule(namespace=namespaces, agent=st.sampled_from((None, *AGENTS)))
    def forget(self, namespace: str, agent: str | None) -> None:
        self.composer.forget(namespace, agent)
        space = self.composer.library.spaces.get(namespace)
        held = [] if space is None else [*space.segments.values(), *space.fixed.values()]
        sources = [
            s
            for (name, _), s in self.composer.library.sources.items()
            if name.rpartition("/")[0] == namespace
        ]
        assert all(agent not in h.owners for h in held)
        assert all(agent not in s.owners | s.seen_by for s in sources)
        if agent is None:
            assert not held
            assert not sources

    @rule(namespace=namespaces, number=st.integers(0, len(TEXTS) - 1), known=st.booleans())
    def register(self, namespace: str, number: int, known: bool) -> None:
        if known:
            self.composer.library.register(namespace, f"text {number}", TEXTS[number].tolist())
        else:
            self.composer.library.unregister(namespace, f"text {number}")

    @rule()
    def calibrate(self) -> None:
        ledger = self.composer.ledger
        for namespace, template in list(ledger.entries):
            ledger.calibrate(namespace, template, "kvcomm+tail", [Pair(0.01, 0.01, 1.0)] * 20)

    @rule()
    def flush(self) -> None:
        self.keeping.flush()

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        """Cleanly, or with what was flushed before."""
        if clean:
            self.keeping.flush(everything=True)
        before = {
            (n, t): s.mark for n, p in self.composer.library.spaces.items() for t, s in p.segments.items()
        }
        entries = self.composer.ledger.entries
        self.keep.close()
        self._open()
        if clean:
            after = {
                (n, t): s.mark for n, p in self.composer.library.spaces.items() for t, s in p.segments.items()
            }
            assert after.items() <= before.items()
            assert self.composer.ledger.entries == entries

    def _segment(self, namespace: str, ids: list[int], span: Span) -> Segment | None:
        return self.composer.library.segment(namespace, text_hash(ids[span.start : span.stop]))

    @invariant()
    def budgets_hold(self) -> None:
        library = self.composer.library
        library.check_integrity()
        assert library.nbytes <= BUDGET
        assert library.pool.nbytes <= ANCHORS
        assert sum(p.stat().st_size for p in self.keep.items.iterdir()) <= DISK

    @invariant()
    def composed_state_is_never_exact(self) -> None:
        """Invariant 15, as far as the library goes."""
        for space in self.composer.library.spaces.values():
            for segment in space.segments.values():
                assert segment.mark in (self.read if segment.provenance.exact else self.made)
                assert segment.provenance.hops <= 1

    def teardown(self) -> None:
        self.keep.close()


def _mark(ids: list[int], state: State, span: Span) -> bytes:
    return Segment(
        np.array(ids[span.start : span.stop]), PackedState.of(state[span.start : span.stop], 8)
    ).mark


TestHome = Home.TestCase
TestHome.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)


@pytest.mark.slow
def test_any_order_for_long() -> None:
    run_state_machine_as_test(
        Home, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
