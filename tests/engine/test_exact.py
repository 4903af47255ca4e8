"""Exact reuse is bit for bit the uninterrupted run, however the state was kept in between."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from agentmem.blockpool import arena
from agentmem.engine import recall
from agentmem.engine.request import ChatRequest
from agentmem.home import default_home
from agentmem.model.loaded import LoadedModel, load
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.engine.turns import say, script, words
from tests.engine.uninterrupted import Recorder, Uninterrupted

BETWEEN = ("hot", "evict", "restart")
TRACES = 204
PER_TEST = 4


def recorded(settings: Settings, model: LoadedModel, keep: list[np.ndarray]) -> Runtime:
    """A runtime that notes the logits that choose tokens."""
    runtime = Runtime.open(settings, lambda: model)
    runner = runtime._engine.runner
    runner.feed.network = runner.network = runtime._call(lambda: Recorder(model.model, keep))
    return runtime


def check_trace(
    home: Path, model, rng: random.Random, agent: str, *, longest: int, page_tokens: int, format: str
) -> None:
    """One random conversation, its state hot, evicted or restarted between turns, against the uninterrupted run."""
    logits: list[np.ndarray] = []
    settings = Settings(
        home=home, ram_budget="48MiB", page_tokens=page_tokens, chunk_tokens=128, kv_format=format
    )
    reference = Uninterrupted(
        model(), format=format, page_tokens=page_tokens, chunk_tokens=128,
        calibrations=settings.paths.calibration,
    )  # fmt: skip
    runtime = recorded(settings, model(), logits)
    messages = [{"role": "system", "content": f"You are {agent}."}]
    previous = 0
    try:
        for number, (text, limit) in enumerate(script(rng, turns=rng.randrange(2, 7), longest=longest)):
            messages = [*messages, {"role": "user", "content": text}]
            want, want_logits, want_fed = reference.turn(messages, limit)
            if number:
                between = rng.choice(BETWEEN)
                if between == "evict":
                    runtime.evict(agent)
                elif between == "restart":
                    runtime.close()
                    runtime = recorded(settings, model(), logits)
            logits.clear()
            got = say(runtime, ChatRequest(agent, messages, max_tokens=limit))
            assert got.text == want == got.streamed
            np.testing.assert_array_equal(logits[0], want_logits)
            assert got.memory["prefilled_tokens"] == want_fed
            assert got.memory["exact_tokens"] == previous
            assert got.memory["committed"]
            previous = reference_state(reference)
            messages = [*messages, {"role": "assistant", "content": got.text}]
    finally:
        runtime.close()


def reference_state(reference: Uninterrupted) -> int:
    return len(reference.table)


@pytest.mark.parametrize(
    "group", [pytest.param(g, marks=pytest.mark.slow if g > 0 else ()) for g in range(TRACES // PER_TEST)]
)
def test_tiny_traces(tmp_path: Path, group: int) -> None:
    """Random conversations on tiny random models; text, logits and fed tokens equal the uninterrupted run's."""
    for i in range(PER_TEST):
        rng = random.Random(1000 * group + i)
        seed, page = rng.randrange(50), rng.choice([16, 32, 64])
        format = rng.choice(["q4", "q4", "q3", "q4-plain", "q4-rotated", "k8v4-plain", "fp16"])
        architecture = rng.choice(["llama", "llama", "qwen3"])
        check_trace(
            tmp_path / str(i), lambda a=architecture, s=seed: random_model(a, seed=s), rng, f"agent-{i}",
            longest=60, page_tokens=page, format=format,
        )  # fmt: skip


@pytest.mark.parametrize("group", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_tiny_traces_in_device_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """The same with the arena of a discrete GPU, which MLX updates, and a stage that holds one layer at a time."""
    monkeypatch.setattr(arena, "unified_memory", lambda: False)
    monkeypatch.setattr(recall, "STAGE_WORDS", 4096)
    for i in (range(3), range(3, 12))[group]:
        rng = random.Random(900_000 + i)
        model = random_model("llama", seed=i)
        check_trace(tmp_path / str(i), lambda m=model: m, rng, "gpu", longest=60, page_tokens=32, format="q4")


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    """The embedded model; its weights are evaluated, so every runtime of this module may share them."""
    model = load("embedded", default_home())
    mx.eval(model.model.parameters())
    return model


@pytest.mark.slow(minutes=0.5)
@pytest.mark.parametrize("trace", range(20))
def test_smollm_traces(tmp_path: Path, smollm: LoadedModel, trace: int) -> None:
    """The same on the embedded model, with messages from one token to over three pages."""
    rng = random.Random(7000 + trace)
    check_trace(tmp_path, lambda: smollm, rng, "smol", longest=55, page_tokens=32, format="q4")


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["last reply", "middle", "truncated", "system prompt", "regenerate"])
def test_diverged_history_reuses_the_common_prefix(tmp_path: Path, edit: str) -> None:
    """A history that differs reuses exactly the tokens it shares, and the answer is that of a home that only saw the new one."""
    model = random_model("llama", seed=3)
    rng = random.Random(11)
    runtime = Runtime.open(
        Settings(home=tmp_path / "a", ram_budget="48MiB", page_tokens=16, kv_format="fp16"), lambda: model
    )
    messages = [{"role": "system", "content": "You are a clerk of the tide office."}]
    ids: list[int] = []
    for _ in range(3):
        messages.append({"role": "user", "content": words(rng, 12)})
        text = say(runtime, ChatRequest("clerk", messages, max_tokens=9)).text
        messages.append({"role": "assistant", "content": text})
        ids = model.tokenizer.encode(model.tokenizer.render(messages, generation=False))
    asked = [dict(m) for m in messages]
    if edit == "last reply":
        asked[-1]["content"] = asked[-1]["content"][:4] + "EDIT"
    elif edit == "middle":
        asked[3]["content"] = asked[3]["content"][:20] + " something else"
    elif edit == "truncated":
        asked = asked[:3]
    elif edit == "system prompt":
        asked[0]["content"] = "You are a clerk of the land office."
    else:
        asked = asked[:-2]
    asked.append({"role": "user", "content": "And now?"}) if edit != "regenerate" else asked.append(
        dict(messages[-2])
    )
    new = model.tokenizer.encode(model.tokenizer.render(asked))
    shared = next(
        (i for i, (a, b) in enumerate(zip(ids, new, strict=False)) if a != b), min(len(ids), len(new))
    )
    turn = say(runtime, ChatRequest("clerk", asked, max_tokens=9))
    assert turn.usage["prompt_tokens_details"]["cached_tokens"] == min(shared, len(new) - 1)
    again = say(
        runtime,
        ChatRequest(
            "clerk",
            [*asked, {"role": "assistant", "content": turn.text}, {"role": "user", "content": "So?"}],
            max_tokens=4,
        ),
    )
    assert again.memory["exact_tokens"] >= len(new) + len(turn.text) - 1
    runtime.close()
    fresh = Runtime.open(
        Settings(home=tmp_path / "b", ram_budget="48MiB", page_tokens=16, kv_format="fp16"), lambda: model
    )
    assert say(fresh, ChatRequest("clerk", asked, max_tokens=9)).text == turn.text
    fresh.close()
