"""A blend in the engine: layers one by one beside other sequences, and rows that are put when all are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agentmem.compose.blend import blended
from agentmem.compose.composer import Composition, Policy, Span
from agentmem.compose.planners import Blend, Put, Read, Steps
from agentmem.compose.state import State
from agentmem.engine.composing import Composing
from agentmem.engine.request import Delta, Finished, Started
from agentmem.errors import AgentMemError
from agentmem.model.network import Network
from agentmem.model.random import random_model
from agentmem.quant.format import LayerShape
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.engine.test_composing import Dictated, check, composed
from tests.runtime.agents import BUDGET, LONG, Running, ask, cached, turn
from tests.runtime.test_requests import cancelled

pytestmark = pytest.mark.slow

TEXT = LONG[:150] + " then " + LONG
UNKNOWN = slice(30, 50)
LAYERS = 4
"""Tokens are chosen at the second: of a model with two of them, all is read anew."""


class Blends(Dictated):
    """Blends what it would put. Of some of its tokens it knows nothing, and has no state worth the name."""

    share = 1.0

    def plan(
        self, namespace: str, ids: Sequence[int], spans: Sequence[Span], known: int, policy: Policy,
        agent: str = "",
    ) -> Composition | None:  # fmt: skip
        made = super().plan(namespace, ids, spans, known, policy, agent)
        if made is None:
            return None
        steps: Steps = []
        for step in made.steps:
            if isinstance(step, Put):
                unknown = np.zeros(len(step.ids), bool)
                unknown[UNKNOWN] = True
                state = replace(step.state, rows=step.state.rows + 0.0)
                state.rows[UNKNOWN] = 7.0
                steps.append(Blend(step.ids, state, unknown, self.share))
            else:
                steps.append(step)
        return replace(made, steps=steps)


def blending(home: Path, **options: Any) -> tuple[Runtime, Blends]:
    settings = Settings(home=home, **{"ram_budget": BUDGET, "itl_target_ms": 1e6, **options})
    runtime = Runtime.open(settings, lambda: random_model("llama", seed=0, num_hidden_layers=LAYERS))
    composer = Blends(runtime)
    runtime._engine.composing = Composing(runtime._engine.composing.bench, lambda: composer)
    return runtime, composer


def after(runtime: Runtime, namespace: str, reuse: str) -> Finished:
    """Behind a prefix that is exact and, in part, in packed pages."""
    turn(runtime, "known", LONG[:150], namespace=namespace)
    request = ask("c", TEXT, max_tokens=2, top_logprobs=20, reuse=reuse, namespace=namespace)
    return Running(runtime, request).end()


def apart(a: Finished, b: Finished) -> float:
    """How far the two are in what they predict first: the median over the tokens that the second finds likeliest."""
    assert a.logprobs is not None
    assert b.logprobs is not None
    said = {top.token: top.logprob for top in a.logprobs[0].top}
    return float(np.median([abs(said.get(top.token, -20.0) - top.logprob) for top in b.logprobs[0].top]))


@pytest.mark.parametrize("kv_format", ["fp16", "q4"])
@pytest.mark.parametrize("chunk", [32, 512])
def test_tokens_that_are_all_read_anew_are_as_in_a_dense_run(
    tmp_path: Path, kv_format: str, chunk: int
) -> None:
    """Invariant 16, whatever their state was before; and 0 of it leaves all but the unknown tokens as they were."""
    runtime, composer = blending(tmp_path, kv_format=kv_format, chunk_tokens=chunk, page_tokens=32)
    want = after(runtime, "dense", "exact")
    composer.wrong = 2.0
    got = after(runtime, "all", "composed")
    assert cached(got) == cached(want) > 64
    assert runtime.explain("c", namespace="all")["composition"] == ["composed for a test"]
    composer.share = 0.0
    wrong = after(runtime, "none", "composed")
    composer.wrong = 0.0
    right = after(runtime, "right", "composed")
    tolerance = 1e-3 if kv_format == "fp16" else 0.05
    assert apart(got, want) < tolerance
    assert apart(right, want) < tolerance
    assert apart(wrong, want) > 4 * tolerance
    check(runtime)
    runtime.close()


def test_others_go_on_between_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer in a step: whoever decodes gets a token meanwhile."""
    runtime, _ = blending(tmp_path)
    turn(runtime, "known", LONG[:150])
    seen: list[int] = []
    other = Running(runtime, ask("other", "count", max_tokens=300))
    layer = Network.layer

    def noted(network: Network, number: int, *args: Any) -> Any:
        seen.append(sum(isinstance(e, Delta) for e in list(other.events)))
        return layer(network, number, *args)

    while not any(isinstance(e, Delta) for e in list(other.events)):
        pass
    runtime._call(lambda: runtime._engine.composing.blends)
    runtime._call(lambda: monkeypatch.setattr(Network, "layer", noted))
    assert Running(runtime, composed("c", TEXT, max_tokens=2)).end().text is not None
    other.end()
    assert len(seen) == LAYERS
    assert seen[0] < seen[-1], "texts come between the layers"
    check(runtime)
    runtime.close()


def test_a_blend_that_is_cancelled_gives_everything_back(tmp_path: Path) -> None:
    runtime, _ = blending(tmp_path)
    turn(runtime, "known", LONG[:150])
    stopped = cancelled(runtime, composed("c", TEXT, max_tokens=300), Started)
    assert stopped.finish_reason == "cancelled"
    check(runtime)
    again = Running(runtime, composed("c", "go on")).end()
    assert again.text
    assert runtime.explain("c")["composed_tokens"] == 0, "all of it was read anew"
    runtime.close()


def test_a_blend_that_finds_no_slots_fails_alone(tmp_path: Path) -> None:
    runtime, _ = blending(tmp_path, page_tokens=16)
    runtime._call(lambda: None)
    pool = runtime._pool
    held = runtime._call(lambda: pool.slots.take(pool.slots.free - 4))
    with pytest.raises(AgentMemError):
        Running(runtime, composed("c", TEXT)).end()
    runtime._call(lambda: pool.release(tuple(held)))
    check(runtime)
    assert Running(runtime, composed("c", TEXT)).end().text
    check(runtime)
    runtime.close()


def test_reads_around_a_blend_stay_reads() -> None:
    shapes = (LayerShape(1, 2, 2),)

    def put(*ids: int) -> Put:
        return Put(ids, State(mx.ones((len(ids), 4)), shapes))

    plain: Steps = [Read((0, 1)), put(2, 3), Read((4,)), put(5), Read((6, 7))]
    first, middle, last = blended(plain)
    assert (first, last) == (plain[0], plain[-1])
    assert isinstance(middle, Blend)
    assert middle.ids == (2, 3, 4, 5)
    assert middle.unknown.tolist() == [False, False, True, False]
    assert middle.state.rows[:, 0].tolist() == [1, 1, 0, 1]
    assert blended([Read((1, 2))]) == [Read((1, 2))]
