"""Several replies to one prompt, stop strings and log probabilities, alone and beside other requests."""

from __future__ import annotations

import itertools
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agentmem.engine.request import ChatRequest, Delta, Finished, Sampling
from agentmem.engine.sampler import Sampler
from agentmem.errors import AgentMemError, ContextOverflow
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, Running, ask, cached, memory, open_runtime, turn
from tests.runtime.test_requests import cancelled, hold
from tests.tiny_model import END_TOKEN

pytestmark = pytest.mark.slow

SAMPLED = Sampling(temperature=1.0, seed=7)
PROMPT = LONG[:70]
ROOMS = itertools.count()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    runtime = open_runtime(tmp_path_factory.mktemp("choices") / "home")
    yield runtime
    runtime.close()


@pytest.fixture
def runtime(shared: Runtime) -> Any:
    yield shared
    shared._call(shared._pool.check)


def new(text: str = PROMPT, **options: Any) -> ChatRequest:
    """A question to an agent that shares nothing with any other."""
    number = next(ROOMS)
    return ask(f"agent-{number}", text, **{"namespace": f"room-{number}", "max_tokens": 12, **options})


def say(runtime: Runtime, text: str = PROMPT, **options: Any) -> Finished:
    return Running(runtime, new(text, **options)).end()


def texts(finished: Finished) -> list[str]:
    return [choice.text for choice in finished.choices]


def test_greedy_choices_are_equal_and_the_prompt_runs_once(runtime: Runtime) -> None:
    one = say(runtime)
    many = say(runtime, n=8)
    assert texts(many) == [one.text] * 8
    assert len({choice.finish_reason for choice in many.choices}) == 1
    assert many.usage["prompt_tokens"] == one.usage["prompt_tokens"] == memory(many)["prefilled_tokens"]
    assert many.usage["completion_tokens"] == 8 * one.usage["completion_tokens"]
    assert many.usage["total_tokens"] == many.usage["prompt_tokens"] + many.usage["completion_tokens"]


def test_sampled_choices_differ_and_a_seed_repeats_them(runtime: Runtime) -> None:
    first = say(runtime, n=4, sampling=SAMPLED)
    assert len(set(texts(first))) == 4
    again = say(runtime, n=4, sampling=SAMPLED)
    assert texts(again) == texts(first)
    fewer = say(runtime, n=2, sampling=SAMPLED)
    assert texts(fewer) == texts(first)[:2]
    alone = say(runtime, sampling=SAMPLED)
    assert texts(alone) == texts(first)[:1]
    free = say(runtime, n=3, sampling=Sampling(temperature=1.0))
    assert len(set(texts(free))) == 3


def test_the_session_keeps_the_first_choice_only(runtime: Runtime) -> None:
    def talk(n: int) -> list[tuple[str, int, int]]:
        request, replies = new(n=n, sampling=SAMPLED), list[Finished]()
        for text in (PROMPT, "and then?", "why?"):
            request.messages = [{"role": "user", "content": text}]
            replies.append(Running(runtime, request).end())
        assert runtime.agent(request.agent, request.namespace)["turns"] == 3
        return [(r.text, cached(r), r.usage["prompt_tokens"]) for r in replies]

    assert talk(3) == talk(1)


@pytest.mark.slow
def test_only_the_first_choice_is_there_after_a_restart(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    for n in (1, 4):
        turn(runtime, f"of-{n}", LONG, n=n, sampling=SAMPLED, namespace=f"of-{n}")
    runtime.close()
    runtime = open_runtime(tmp_path)
    one, four = (runtime.agent(f"of-{n}", f"of-{n}") for n in (1, 4))
    assert four["tokens"] == one["tokens"]
    assert four["disk_bytes"] == pytest.approx(one["disk_bytes"], abs=64), "but for the counters of the turn"
    second = turn(runtime, "of-4", "and then?", n=2, namespace="of-4")
    assert cached(second) == four["tokens"]
    assert texts(second)[0] == texts(second)[1]
    runtime.close()


@pytest.mark.parametrize(
    "length", [32, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 31, 33, 63, 64, 65))]
)
def test_choices_of_a_prompt_around_the_edge_of_a_page(tmp_path: Path, length: int) -> None:
    runtime = open_runtime(tmp_path, page_tokens=32)
    empty = turn(runtime, "p", "x", max_tokens=1).usage["prompt_tokens"] - 1
    text = "y" * (-empty % 32 + length)
    options = {"max_tokens": 34, "sampling": Sampling(temperature=0.8, seed=1)}
    alone = say(runtime, text, **options).text
    together = say(runtime, text, n=3, **options)
    assert together.text == alone
    assert len(set(texts(together))) == 3
    runtime._call(runtime._pool.check)
    runtime.close()


def stop_of(first: str, others: list[str]) -> str | None:
    """Three characters of `first` that the others do not say."""
    parts = [first[i : i + 3] for i in range(4, len(first) - 3)]
    return next((p for p in parts if not any(p in other for other in others)), None)


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_stop_string_ends_its_own_choice_only(runtime: Runtime, which: int) -> None:
    whole = texts(say(runtime, n=3, max_tokens=24, sampling=SAMPLED))
    stop = stop_of(whole[which], [t for i, t in enumerate(whole) if i != which])
    assert stop is not None
    request = new(n=3, max_tokens=24, sampling=SAMPLED, stop=[stop])
    done = Running(runtime, request).end()
    for i, choice in enumerate(done.choices):
        cut = whole[i].partition(stop)[0]
        assert choice.text == cut
        assert choice.finish_reason == ("stop" if i == which else "length")
    after = turn(runtime, request.agent, "go on", namespace=request.namespace)
    assert after.usage["prompt_tokens"] > done.usage["prompt_tokens"]


def test_stop_strings_across_tokens_beside_other_requests(runtime: Runtime) -> None:
    """Every byte is a token: each of these stop strings comes in pieces."""
    plain = [say(runtime, f"{i} {PROMPT}", max_tokens=24).text for i in range(4)]
    stops = [[plain[0][6:10]], [], [plain[2][3:9], "never said"], [plain[3][-2:]]]
    with ThreadPoolExecutor(4) as pool:
        got = list(
            pool.map(lambda i: say(runtime, f"{i} {PROMPT}", max_tokens=24, stop=stops[i]).text, range(4))
        )
    want = [
        min((t.partition(s)[0] for s in stop), key=len, default=t)
        for t, stop in zip(plain, stops, strict=True)
    ]
    assert got == want
    assert sum(len(g) < len(p) for g, p in zip(got, plain, strict=True)) == 3


def test_cancelling_ends_all_choices(runtime: Runtime) -> None:
    request = new(n=3, max_tokens=500, sampling=SAMPLED)
    stopped = cancelled(runtime, request, Delta, 30)
    assert [choice.finish_reason for choice in stopped.choices] == ["cancelled"] * 3
    assert stopped.usage["completion_tokens"] < 60
    assert memory(stopped)["committed"]
    after = turn(runtime, request.agent, "go on", namespace=request.namespace)
    assert cached(after) >= stopped.usage["prompt_tokens"]
    assert runtime.agent(request.agent, request.namespace)["turns"] == 2


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_failing_choice_fails_its_request_and_nobody_else(
    runtime: Runtime, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = say(runtime, f"{PROMPT} b", max_tokens=30).text
    seed = [SAMPLED.seed, None, Sampler(SAMPLED, 0).sibling(2)._seed][which]
    choose = Sampler.choose

    def broken(self: Sampler, logits: mx.array, position: int) -> mx.array:
        if self._seed == seed and position == 5:
            raise RuntimeError("a kernel failed")
        return choose(self, logits, position)

    monkeypatch.setattr(Sampler, "choose", broken)
    request = new(n=3, max_tokens=30, sampling=SAMPLED)
    failing, other = Running(runtime, request), Running(runtime, new(f"{PROMPT} b", max_tokens=30))
    with pytest.raises(AgentMemError, match="a kernel failed"):
        failing.end()
    assert other.end().text == want
    monkeypatch.undo()
    assert not any(isinstance(e, Finished) for e in failing.events)
    assert request.agent not in [agent["agent"] for agent in runtime.agents(request.namespace)]
    assert Running(runtime, request).end().text


def test_choices_beside_other_requests_say_what_they_say_alone(runtime: Runtime) -> None:
    def both(round: str) -> list[list[str]]:
        def one(i: int) -> list[str]:
            options: dict[str, Any] = {
                "n": 1 + i,
                "max_tokens": 10 + 3 * i,
                "sampling": Sampling(temperature=0.9, seed=i),
            }
            return texts(say(runtime, f"{i} {PROMPT}", **options))

        if round == "alone":
            return [one(i) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(one, range(4)))

    assert both("beside") == both("alone")


@pytest.mark.parametrize(
    "options", [{"max_tokens": 1}, {"sampling": Sampling(logit_bias={END_TOKEN: 100.0})}]
)
def test_choices_that_all_end_with_their_first_token(runtime: Runtime, options: dict[str, Any]) -> None:
    done = say(runtime, n=3, **options)
    ended = "sampling" in options
    assert [c.finish_reason for c in done.choices] == ["stop" if ended else "length"] * 3
    assert [len(c.text) for c in done.choices] == [0 if ended else 1] * 3
    assert done.usage["completion_tokens"] == 3


@pytest.mark.slow(minutes=0.5)
def test_random_requests_beside_each_other_say_what_they_say_alone(tmp_path: Path) -> None:
    """Any number of choices, stop strings, filters, penalties, log probabilities; some of them are cancelled."""
    rng = random.Random(3)

    def request() -> dict[str, Any]:
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            min_p=rng.choice([0.0, 0.02]),
            seed=rng.randrange(100),
            frequency_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.2]),
        )
        return {
            "text": f"{rng.randrange(4)} {LONG[: rng.randrange(200)]}",
            "n": rng.choice([1, 1, 2, 5]),
            "max_tokens": rng.randrange(1, 40),
            "stop": rng.choice([[], ["e"], ["th", "an", "q"]]),
            "top_logprobs": rng.choice([None, 0, 3]),
            "sampling": sampling,
        }

    requests = [request() for _ in range(60)]
    runtime = open_runtime(tmp_path)

    def run(options: dict[str, Any]) -> list[tuple[str, str, int]]:
        done = say(runtime, **options)
        return [(c.text, c.finish_reason, len(c.logprobs or ())) for c in done.choices]

    def cancel(i: int) -> None:
        running = Running(runtime, new(n=1 + i % 8, max_tokens=200))
        running._over.wait(rng.random() / 5)
        running.ticket.cancel()
        assert running._over.wait(60)

    alone = [run(options) for options in requests]
    with ThreadPoolExecutor(12) as pool:
        leaving = [pool.submit(cancel, i) for i in range(30)]
        assert list(pool.map(run, requests)) == alone
        for left in leaving:
            left.result()
    runtime._call(runtime._pool.check)
    assert runtime._call(lambda: runtime._pool.tails.used) == 0
    runtime.close()


def test_choices_that_cannot_fit_are_refused(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path, ram_budget=1 << 20)
    fits = turn(runtime, "ada", "hello", max_tokens=64)
    assert fits.finish_reason == "length"
    with pytest.raises(ContextOverflow, match="or n"):
        turn(runtime, "ada", "hello", max_tokens=64, n=8)
    gate = threading.Event()
    hold(runtime, gate)
    running = [Running(runtime, ask(f"a{i}", "hello", n=2, max_tokens=30)) for i in range(4)]
    gate.set()
    assert all(len(set(texts(r.end()))) == 1 for r in running)
    runtime._call(runtime._pool.check)
    runtime.close()


def reference(text: str, tokens: list[int]) -> np.ndarray:
    """Log probabilities [len(tokens), vocab] of mlx-lm's own cache at the places of a reply's tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    model = random_model("llama", seed=0)
    prompt = model.tokenizer.encode(model.tokenizer.render([{"role": "user", "content": text}]))
    logits = model.model(mx.array([prompt + tokens]), cache=make_prompt_cache(model.model))[
        0, len(prompt) - 1 : -1
    ]
    logits = logits.astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


@pytest.mark.parametrize("top", [0, 1, 20])
def test_log_probabilities_are_the_models_own(tmp_path: Path, top: int) -> None:
    """Whatever bends the choice: temperature, bias and penalties leave no trace in them."""
    runtime = open_runtime(tmp_path, kv_format="fp16")
    sampling = Sampling(
        temperature=1.5, seed=3, logit_bias={65: 4.0}, frequency_penalty=1.0, repetition_penalty=1.3
    )
    done = turn(runtime, "ada", "hello there", n=2, max_tokens=12, sampling=sampling, top_logprobs=top)
    for choice in done.choices:
        assert choice.logprobs is not None
        assert b"".join(one.piece for one in choice.logprobs).decode(errors="replace") == choice.text
        want = reference("hello there", [one.token for one in choice.logprobs])
        for one, row in zip(choice.logprobs, want, strict=True):
            assert one.logprob == pytest.approx(row[one.token], abs=0.02)
            assert len(one.top) == top
            best = np.sort(row)[::-1][:top]
            assert [t.logprob for t in one.top] == pytest.approx(best, abs=0.02)
            assert [t.logprob for t in one.top] == sorted((t.logprob for t in one.top), reverse=True)
            assert sum(math.exp(t.logprob) for t in one.top) <= 1 + 1e-5
            for t in one.top:
                assert t.logprob == pytest.approx(row[t.token], abs=0.02)
    runtime.close()


def test_greedy_tokens_are_the_first_of_the_top(runtime: Runtime) -> None:
    done = say(runtime, max_tokens=20, top_logprobs=2)
    assert done.logprobs
    for one in done.logprobs:
        assert (one.top[0].token, one.top[0].logprob) == (one.token, one.logprob)


def test_asking_for_log_probabilities_changes_no_token(runtime: Runtime) -> None:
    cases: list[dict[str, Any]] = [{}, {"sampling": SAMPLED, "n": 3}]
    for options in cases:
        plain, asked = say(runtime, **options), say(runtime, top_logprobs=5, **options)
        assert texts(asked) == texts(plain)
        assert [choice.logprobs for choice in plain.choices] == [None] * len(plain.choices)
        assert all(choice.logprobs for choice in asked.choices)


def test_text_that_a_stop_cuts_off_has_no_log_probabilities(runtime: Runtime) -> None:
    plain = say(runtime, max_tokens=24).text
    done = say(runtime, max_tokens=24, stop=[plain[6:10]], top_logprobs=0)
    assert done.text == plain.partition(plain[6:10])[0]
    assert done.logprobs is not None
    assert b"".join(one.piece for one in done.logprobs).decode() == done.text
    assert done.usage["completion_tokens"] > len(done.logprobs)
