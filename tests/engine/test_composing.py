"""Composed prompts in the engine: what is put counts for the answer, and for nothing that comes after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.compose.composer import EXACT, Composer, Composition, Policy, Provenance, Span
from agentmem.compose.lesson import Look
from agentmem.compose.library import Library
from agentmem.compose.planners import Put, Read, Steps
from agentmem.compose.prompt import Prompt
from agentmem.compose.rotation import rotations
from agentmem.compose.state import State
from agentmem.engine.composing import Composing
from agentmem.engine.request import ChatRequest, Delta, Finished, Started
from agentmem.errors import AgentMemError, BadRequest
from agentmem.model.network import Network
from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, Running, ask, cached, memory, open_runtime, turn
from tests.runtime.test_requests import cancelled

pytestmark = pytest.mark.slow

PUT = 100


class Dictated(Composer):
    """A composer that puts some tokens of every prompt, as they are when the prompt is read whole, and notes what it is taught.

    read: tokens behind the prefix that are read before `PUT` are put and the rest is read. wrong: what is put is off by so much.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(Library(0, 0), audit_share=0.0)
        self.read, self.wrong, self.plans = 3, 0.0, True
        self.asked: list[str] = []
        self.heard: list[tuple[list[int], list[Span], Look, Provenance]] = []
        self._runtime = runtime

    def whole(self, ids: Sequence[int]) -> Prompt:
        model = self._runtime._engine.model
        prompt = Prompt(Network(model.model), rotations(model.model), model.dtype)
        prompt.read(list(ids))
        return prompt

    def plan(
        self, namespace: str, ids: Sequence[int], spans: Sequence[Span], known: int, policy: Policy,
        agent: str = "",
    ) -> Composition | None:  # fmt: skip
        at = known + self.read
        self.asked.append(policy.planner)
        if not self.plans or len(ids) <= at + PUT:
            return None
        state, ids = self.whole(ids).state(at, at + PUT), tuple(ids)
        put = Put(ids[at : at + PUT], State(state.rows + self.wrong, state.shapes))
        steps: Steps = [Read(ids[known:at]), put, Read(ids[at + PUT :])]
        return Composition(steps, b"", ("composed for a test",), provenance=Provenance(hops=1))

    def learn(
        self, namespace: str, ids: Sequence[int], spans: Sequence[Span], state: Look, provenance: Provenance,
        agent: str = "",
    ) -> None:  # fmt: skip
        self.heard.append((list(ids), list(spans), state, provenance))


def dictated(home: Path, **options: Any) -> tuple[Runtime, Dictated]:
    runtime = open_runtime(home, **options)
    composer = Dictated(runtime)
    runtime._engine.composing = Composing(runtime._engine.composing.bench, lambda: composer)
    return runtime, composer


def composed(agent: str, text: str = LONG, **options: Any) -> ChatRequest:
    return ask(agent, text, **{"reuse": "composed", **options})


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Runtime, Dictated]]:
    runtime, composer = dictated(tmp_path)
    yield runtime, composer
    runtime.close()


def taken(runtime: Runtime, state: Look, start: int, stop: int) -> np.ndarray:
    return runtime._call(lambda: np.array(state(start, stop).rows))


def heard(runtime: Runtime, composer: Dictated) -> list[tuple[list[int], list[Span], Look, Provenance]]:
    """What it was taught by the turns that are over."""
    return runtime._call(lambda: composer.heard)


def check(runtime: Runtime) -> None:
    """Nothing is held by nobody, and no turn holds a place for its tail."""
    runtime._call(runtime._pool.check)
    assert runtime._call(lambda: runtime._pool.tails.used) == 0
    assert not runtime._call(lambda: [p for t in runtime._pool.trees() for p in t.pages() if p.pins])


@pytest.mark.parametrize("kv_format", ["fp16", "q4"])
@pytest.mark.parametrize("chunk", [32, 512])
def test_state_that_is_put_is_as_good_as_state_that_was_read(
    tmp_path: Path, kv_format: str, chunk: int
) -> None:
    """Behind an exact prefix, in prompts that are fed in chunks, and in those that are not."""
    runtime, composer = dictated(tmp_path, kv_format=kv_format, chunk_tokens=chunk)
    text = LONG[:150] + " then " + LONG

    def after(namespace: str, request: ChatRequest) -> Finished:
        turn(runtime, "known", LONG[:150], namespace=namespace)
        request.namespace = namespace
        return Running(runtime, request).end()

    want = after("dense", ask("c", text, max_tokens=24))
    for read in (0, 3, 70):
        composer.read = read
        got = after(f"read-{read}", composed("c", text, max_tokens=24))
        assert got.text == want.text
        assert memory(got)["composed_tokens"] == PUT
        assert cached(got) == memory(got)["exact_tokens"] == cached(want) > 64
        assert memory(got)["prefilled_tokens"] == got.usage["prompt_tokens"] - cached(got) - PUT
        check(runtime)
    composer.wrong = 0.5
    assert after("wrong", composed("c", text, max_tokens=24)).text != want.text
    runtime.close()


def test_nothing_that_was_composed_is_found_again(pair: tuple[Runtime, Dictated]) -> None:
    """The state of a composed turn ends with its exact prefix, for its own agent and for all others, also after a restart."""
    runtime, composer = pair
    known = turn(runtime, "known", LONG)
    prefix = cached(Running(runtime, ask("probe", LONG + " more")).end())
    assert prefix > 64
    composer.wrong = 0.5
    first = Running(runtime, composed("c", LONG + " and " + LONG)).end()
    assert cached(first) >= prefix
    assert memory(first)["composed_tokens"] == PUT
    composer.plans = False
    again = turn(runtime, "other", LONG + " and " + LONG)
    assert cached(again) == cached(first)
    assert runtime.agent("c")["turns"] == 1
    check(runtime)
    assert known.text


def test_the_next_turn_is_composed_again_and_its_log_is_whole(tmp_path: Path) -> None:
    runtime, _composer = dictated(tmp_path)
    first = Running(runtime, composed("c")).end()
    assert (cached(first), memory(first)["composed_tokens"]) == (0, PUT)
    second = Running(runtime, composed("c", "and now?")).end()
    assert (cached(second), memory(second)["composed_tokens"]) == (0, PUT)
    assert second.usage["prompt_tokens"] > first.usage["prompt_tokens"] + 6
    told = runtime.explain("c")
    assert (told["reason"], told["composition"]) == ("composed", ["composed for a test"])
    check(runtime)
    runtime.close()
    runtime = open_runtime(tmp_path)
    third = Running(runtime, ask("c", "and then?")).end()
    assert (cached(third), memory(third)["composed_tokens"]) == (0, 0)
    assert third.usage["prompt_tokens"] > second.usage["prompt_tokens"] + 6
    runtime.close()


@pytest.mark.parametrize("kind", [Started, Delta])
def test_a_composed_turn_that_is_cancelled_gives_everything_back(
    pair: tuple[Runtime, Dictated], kind: Any
) -> None:
    runtime, _ = pair
    turn(runtime, "known", LONG[:150])
    stopped = cancelled(runtime, composed("c", LONG[:150] + LONG, max_tokens=300), kind)
    assert stopped.finish_reason == "cancelled"
    check(runtime)
    assert Running(runtime, composed("c", "go on")).end().text


def test_several_replies_to_a_composed_prompt(pair: tuple[Runtime, Dictated]) -> None:
    runtime, _ = pair
    done = Running(runtime, composed("c", n=3)).end()
    assert len({choice.text for choice in done.choices}) == 1
    check(runtime)


def test_composed_and_exact_prompts_beside_each_other(tmp_path: Path) -> None:
    """They share passes; a prompt that begins like a composed one does not go on from its state."""
    runtime, composer = dictated(tmp_path, chunk_tokens=64)
    composer.wrong = 0.5
    alone = open_runtime(tmp_path / "alone", chunk_tokens=64)
    want = turn(alone, "a", LONG, max_tokens=12).text
    alone.close()
    running = [
        Running(runtime, (composed if i % 2 else ask)(f"a{i}", LONG, max_tokens=12, namespace=f"n{i // 2}"))
        for i in range(6)
    ]
    ends = [r.end() for r in running]
    for i, end in enumerate(ends):
        if not memory(end)["composed_tokens"]:
            assert i % 2 == 0 or cached(end)
            assert end.text == want
        else:
            assert i % 2
    check(runtime)
    runtime.close()


def test_a_composed_prompt_that_finds_no_slots_fails_alone(tmp_path: Path) -> None:
    runtime, _composer = dictated(tmp_path, page_tokens=16)
    runtime._call(lambda: None)
    pool = runtime._pool
    held = runtime._call(lambda: pool.slots.take(pool.slots.free - 4))
    with pytest.raises(AgentMemError):
        Running(runtime, composed("c")).end()
    runtime._call(lambda: pool.release(tuple(held)))
    check(runtime)
    assert Running(runtime, composed("c")).end().text
    runtime.close()


@pytest.mark.parametrize("kv_format", ["fp16", "q4"])
def test_what_a_dense_turn_computes_is_taken_down_before_it_is_packed(tmp_path: Path, kv_format: str) -> None:
    """Keys and values of the prompt and of the reply are those of a prompt read whole, to 16 bits."""
    runtime, composer = dictated(tmp_path, kv_format=kv_format, page_tokens=32)
    composer.plans = False
    Running(runtime, composed("c", max_tokens=90)).end()
    ((ids, spans, state, provenance),) = heard(runtime, composer)
    assert provenance == EXACT
    assert [s.kind for s in spans] == ["user", "assistant"]
    assert bytes(ids[spans[0].start : spans[0].stop]).decode() == LONG
    prompt = spans[1].start
    if kv_format == "fp16":  # else the reply itself has been made behind packed pages
        want = np.array(composer.whole(ids).state(0, len(ids)).rows)
        for start, stop in ((0, len(ids)), (30, 100), (prompt, len(ids))):
            assert (
                np.abs(taken(runtime, state, start, stop) - want[start:stop]).max()
                < 0.02 * np.abs(want).max()
            )
    want = np.array(composer.whole(ids[:prompt]).state(0, prompt).rows)
    got = taken(runtime, state, 0, prompt)
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    runtime.close()


def test_an_exact_prefix_teaches_only_what_lies_in_16_bits(tmp_path: Path) -> None:
    runtime, composer = dictated(tmp_path, page_tokens=32)
    composer.plans = False
    turn(runtime, "known", LONG)
    done = Running(runtime, composed("c", LONG + " and more of it")).end()
    reused = cached(done)
    assert reused > 64
    _, _, state, _ = heard(runtime, composer)[0]
    assert len(runtime._call(lambda: state(0, 32))) == 32
    assert len(runtime._call(lambda: state(reused, reused + 10))) == 10
    with pytest.raises(LookupError):
        runtime._call(lambda: state(0, 64))
    runtime.close()


def test_a_composed_turn_teaches_its_reply_only(pair: tuple[Runtime, Dictated]) -> None:
    runtime, composer = pair
    done = Running(runtime, composed("c", max_tokens=80)).end()
    ((ids, spans, state, provenance),) = heard(runtime, composer)
    prompt = done.usage["prompt_tokens"]
    assert provenance.hops == 1
    assert (spans[-1].start, spans[-1].stop) == (prompt, len(ids))
    assert len(runtime._call(lambda: state(prompt, len(ids)))) == len(ids) - prompt
    with pytest.raises(LookupError):
        runtime._call(lambda: state(prompt - 1, len(ids)))


def test_exact_turns_and_agents_that_stay_off_the_disk_teach_nothing(pair: tuple[Runtime, Dictated]) -> None:
    runtime, composer = pair
    turn(runtime, "a", LONG)
    Running(runtime, composed("b", persist=False)).end()
    assert not heard(runtime, composer)
    assert cached(Running(runtime, ask("off", LONG, reuse="off")).end()) == 0
    assert cached(turn(runtime, "on", LONG)) > 0


def test_a_planner_that_fails_costs_the_plan_not_the_turn(
    pair: tuple[Runtime, Dictated], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, composer = pair
    want = turn(runtime, "a", LONG, namespace="other").text

    def broken(*args: Any) -> None:
        raise ValueError("nothing is right")

    monkeypatch.setattr(composer, "plan", broken)
    done = Running(runtime, composed("b")).end()
    assert (done.text, memory(done)["composed_tokens"]) == (want, 0)
    assert runtime.explain("b")["composition"] == ["not composed: see the daemon's log"]


def test_a_course_that_fails_on_its_way_fails_alone(
    pair: tuple[Runtime, Dictated], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, composer = pair
    good = composer.plan

    def of_another_model(*args: Any) -> Composition | None:
        made = good(*args)
        assert made is not None
        first, put, last = made.steps
        assert isinstance(put, Put)
        short = State(put.state.rows[:, :256], put.state.shapes[:1])
        return Composition([first, Put(put.ids, short), last], b"", made.lines, provenance=made.provenance)

    monkeypatch.setattr(composer, "plan", of_another_model)
    with pytest.raises(AgentMemError):
        Running(runtime, composed("c")).end()
    check(runtime)
    monkeypatch.setattr(composer, "plan", good)
    assert Running(runtime, composed("c")).end().text
    with pytest.raises(BadRequest, match="reuse is one of"):
        composed("c", reuse="always")


def test_a_request_may_say_how_it_is_composed(pair: tuple[Runtime, Dictated]) -> None:
    runtime, composer = pair
    Running(runtime, composed("a")).end()
    Running(runtime, composed("b", planner="lego")).end()
    assert runtime._call(lambda: composer.asked) == ["kvcomm+tail", "lego"]
    with pytest.raises(BadRequest, match="planner is one of"):
        composed("c", planner="dense")
