"""Agents whose memory is not kept whole: bounded, told as such, and apart from what is exact."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from agentmem.engine.request import ChatRequest, Finished
from agentmem.runtime import Runtime
from tests.engine.turns import words
from tests.runtime.agents import Running, ask, memory, open_runtime, turn

BUDGET, BLOCK = 320, 256
EPISODIC = {"kind": "episodic", "budget_tokens": BUDGET, "block_tokens": BLOCK, "episodes": 2}
WINDOW = {"kind": "window", "recent": BLOCK, "sinks": 4}


def opened(home: Path, encoder: str = "hash512") -> Runtime:
    return open_runtime(home, episode_encoder=encoder, ram_budget=32 << 20)


def settled(runtime: Runtime) -> None:
    """Wait until nothing is left to be folded."""
    folds = runtime._engine.episodes.folds
    deadline = time.monotonic() + 60
    while runtime._call(lambda: folds.pending or runtime._memory.unwritten):
        assert time.monotonic() < deadline, "folding never ended"
        time.sleep(0.01)


def talk(runtime: Runtime, agent: str, turns: int, seed: int = 0, longest: int = 40) -> list[Finished]:
    rng = random.Random(seed)
    said = []
    for _ in range(turns):
        said.append(turn(runtime, agent, words(rng, rng.randrange(5, longest)), max_tokens=8))
        settled(runtime)
    return said


def texts(said: list[Finished]) -> list[str]:
    return [one.text for one in said]


def test_what_fits_the_budget_is_what_full_memory_gives(tmp_path: Path) -> None:
    said = []
    for home, policy in (("a", {**EPISODIC, "budget_tokens": 8192}), ("b", {"kind": "full"})):
        runtime = opened(tmp_path / home, "minilm")
        runtime.create("agent", {"memory": policy})
        try:
            said.append(talk(runtime, "agent", 8))
            assert runtime._engine.episodes.encoders._weights is None  # nobody needs an encoder yet
        finally:
            runtime.close()
    assert texts(said[0]) == texts(said[1])
    assert [memory(one)["exact_tokens"] for one in said[0]] == [
        memory(one)["exact_tokens"] for one in said[1]
    ]
    assert not any(memory(one)["compressed_tokens"] for one in said[0])


@pytest.mark.slow(minutes=0.2)
def test_a_long_life_stays_within_its_budget_and_says_what_is_left_out(tmp_path: Path) -> None:
    runtime = opened(tmp_path)
    runtime.create("old", {"memory": EPISODIC})
    try:
        said = talk(runtime, "old", 30)
        assert memory(said[-1])["evicted_tokens"] > BUDGET
        assert memory(said[-1])["exact_tokens"] == 0
        told = runtime.episodes("old")
        assert told["tokens"] > 4 * BUDGET
        assert told["resident_tokens"] <= BUDGET + 2 * BLOCK + 64
        assert any(
            line.startswith("episode") or "episode" in line for line in runtime.explain("old")["memory"]
        )
        # Nobody else is offered what was computed behind a shortened past.
        messages = runtime._call(
            lambda: list(runtime._memory.find("default", "old").spoken["default"].conversation.messages)
        )
        other = Running(runtime, ChatRequest("other", messages, max_tokens=4)).end()
        assert memory(other)["exact_tokens"] <= BUDGET + BLOCK + 64
    finally:
        runtime.close()


def replies(
    home: Path, *, restart_every: int, turns: int = 24, policy: dict[str, Any] = EPISODIC
) -> list[Finished]:
    """A conversation whose daemon is started anew between turns."""
    rng, said = random.Random(5), []
    runtime = opened(home)
    runtime.create("agent", {"memory": policy})
    for number in range(turns):
        said.append(turn(runtime, "agent", words(rng, rng.randrange(5, 40)), max_tokens=6))
        settled(runtime)
        if restart_every and (number + 1) % restart_every == 0:
            runtime.close()
            runtime = opened(home)
    runtime.close()
    return said


@pytest.mark.slow(minutes=0.2)
@pytest.mark.parametrize("policy", [EPISODIC, WINDOW], ids=lambda p: p["kind"])
def test_a_restart_changes_nothing(tmp_path: Path, policy: dict[str, Any]) -> None:
    going_on = replies(tmp_path / "a", restart_every=0, policy=policy)
    started_anew = replies(tmp_path / "b", restart_every=3, policy=policy)
    assert texts(going_on) == texts(started_anew)
    assert memory(going_on[-1])["evicted_tokens"] > 0
    assert [memory(x)["evicted_tokens"] for x in going_on] == [
        memory(x)["evicted_tokens"] for x in started_anew
    ]


@pytest.mark.slow(minutes=0.2)
def test_full_memory_comes_back_from_the_token_log(tmp_path: Path) -> None:
    whole, cut = opened(tmp_path / "a"), opened(tmp_path / "b")
    cut.create("agent", {"memory": EPISODIC})
    try:
        talk(cut, "agent", 20)
        cut.set_policy("agent", {"memory": None})
        settled(cut)
        messages = cut._call(
            lambda: list(cut._memory.find("default", "agent").spoken["default"].conversation.messages)
        )
        asked = [*messages, {"role": "user", "content": "who keeps the lamp?"}]
        back = Running(cut, ChatRequest("agent", asked, max_tokens=12)).end()
        anew = Running(whole, ChatRequest("agent", asked, max_tokens=12)).end()
        assert back.text == anew.text
        assert memory(back)["compressed_tokens"] == memory(back)["evicted_tokens"] == 0
        assert cut.explain("agent")["reason"] == "compressed"
        again = Running(cut, ask("agent", "and the oil?", max_tokens=2)).end()
        assert memory(again)["exact_tokens"] > memory(back)["prefilled_tokens"]
    finally:
        whole.close()
        cut.close()


@pytest.mark.slow(minutes=0.2)
def test_a_prompt_longer_than_the_budget_is_read_in_stretches(tmp_path: Path) -> None:
    runtime = opened(tmp_path)
    runtime.create("reader", {"memory": EPISODIC})
    pool = runtime._pool
    try:
        text = words(random.Random(1), 1000)
        finished = turn(runtime, "reader", text, max_tokens=8)
        assert memory(finished)["prefilled_tokens"] == finished.usage["prompt_tokens"] > 12 * BUDGET
        assert memory(finished)["evicted_tokens"] > 8 * BUDGET
        assert memory(finished)["exact_tokens"] == 0
        most = pool.geometry.worst_slots(BUDGET + 3 * BLOCK + pool.geometry.page_tokens)
        assert 0 < pool.slots.peak <= most
        assert 0 < runtime._engine.episodes.folds.most_rows <= most * pool.geometry.page_tokens
        assert runtime.explain("reader")["reason"] == "new_session"
        following = turn(runtime, "reader", "go on", max_tokens=8)
        assert runtime.explain("reader")["reason"] == "extended"
        assert memory(following)["prefilled_tokens"] < 64
        assert runtime.agent("reader")["turns"] == 2
    finally:
        runtime.close()


def test_a_window_keeps_the_sinks_and_the_newest(tmp_path: Path) -> None:
    runtime = opened(tmp_path)
    runtime.create("agent", {"memory": WINDOW})
    try:
        said = talk(runtime, "agent", 20)
        tokens, left_out = said[-1].usage["prompt_tokens"], memory(said[-1])["evicted_tokens"]
        assert tokens - left_out <= WINDOW["recent"] + WINDOW["sinks"] + 64 + 300
        assert left_out > 2 * BUDGET
        told = runtime.episodes("agent")
        assert told["evicted_tokens"] >= left_out
        assert told["resident_tokens"] <= WINDOW["recent"] + 3 * 64 + 300
        assert "window" in runtime.explain("agent")["memory"][0]
    finally:
        runtime.close()


@pytest.mark.slow(minutes=0.2)
def test_agents_of_all_policies_speak_at_once_as_each_does_alone(tmp_path: Path) -> None:
    policies = {"full": {"kind": "full"}, "episodic": EPISODIC, "window": WINDOW}
    said: dict[str, list[list[str]]] = {}
    for name in ("alone", "together"):
        runtime = opened(tmp_path / name)
        rngs = {kind: random.Random(i) for i, kind in enumerate(policies)}
        said[name] = []
        for kind, policy in policies.items():
            runtime.create(
                kind, {"memory": policy}, kind
            )  # namespaces: nobody begins with what another has said
        for _ in range(14):
            asked = [
                ask(k, words(rng, rng.randrange(5, 40)), max_tokens=10, namespace=k)
                for k, rng in rngs.items()
            ]
            if name == "alone":
                ended = [Running(runtime, request).end() for request in asked]
            else:
                ended = [one.end() for one in [Running(runtime, request) for request in asked]]
            settled(runtime)
            said[name].append(texts(ended))
        runtime.close()
    assert said["alone"] == said["together"]


@pytest.mark.slow(minutes=0.2)
def test_a_fork_goes_on_and_a_forgotten_agent_leaves_nothing(tmp_path: Path) -> None:
    runtime = opened(tmp_path)
    runtime.create("agent", {"memory": EPISODIC})
    try:
        talk(runtime, "agent", 20)
        runtime.fork("agent", "copy")
        both = [turn(runtime, name, "who counts the oil?", max_tokens=4) for name in ("agent", "copy")]
        assert all(memory(one)["evicted_tokens"] for one in both)
        for name in ("agent", "copy"):
            settled(runtime)
            runtime.forget(name)
        assert runtime.budgets()["ram"]["used_bytes"] == 0
        assert runtime.budgets()["disk"]["extent_bytes"] == 0
    finally:
        runtime.close()


@pytest.mark.slow(minutes=0.2)
def test_history_that_is_edited_is_cut_down_anew(tmp_path: Path) -> None:
    runtime = opened(tmp_path)
    runtime.create("agent", {"memory": EPISODIC})
    try:
        talk(runtime, "agent", 24)
        messages = runtime._call(
            lambda: list(runtime._memory.find("default", "agent").spoken["default"].conversation.messages)
        )
        shorter = [*messages[:31], {"role": "user", "content": "no, tell me of the tide instead"}]
        finished = Running(runtime, ChatRequest("agent", shorter, max_tokens=6)).end()
        assert memory(finished)["compressed_tokens"] > BUDGET
        assert finished.usage["prompt_tokens"] - memory(finished)["evicted_tokens"] <= BUDGET + 3 * BLOCK
    finally:
        runtime.close()


SUBJECTS = (
    ("oil", "lamp", "wick", "flame", "keeper", "glass"),
    ("tide", "harbour", "boat", "rope", "gull", "sail"),
)


def about(subject: int, rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(SUBJECTS[subject]) for _ in range(n))


@pytest.mark.slow(minutes=0.3)
def test_a_turn_goes_to_the_episode_that_it_is_about(tmp_path: Path) -> None:
    runtime, rng = opened(tmp_path), random.Random(3)
    runtime.create("agent", {"memory": EPISODIC})
    for number in range(44):
        turn(runtime, "agent", about(number // 4 % 2, rng, 6), max_tokens=3)
        settled(runtime)
    told = runtime.episodes("agent")["episodes"]
    assert len(told) == 2
    assert all(episode["tokens"] and episode["lines"] and episode["title"] for episode in told)
    asked = []
    for subject in (0, 1, 1, 0):
        turn(runtime, "agent", about(subject, rng, 6), max_tokens=3)
        settled(runtime)
        found = runtime.episodes("agent")["episodes"]
        (active,) = [episode for episode in found if episode["active"]]
        assert f"episode {active['id']}" in runtime.explain("agent")["memory"][0]
        asked.append(active["id"])
    assert asked == [asked[0], asked[1], asked[1], asked[0]]
    assert asked[0] != asked[1]
    before = runtime.episodes("agent")["episodes"]
    assert sum(episode["hits"] for episode in before) > 4
    runtime.close()
    runtime = opened(tmp_path)
    try:
        after = runtime.episodes("agent")["episodes"]
        kept = ("id", "title", "lines", "segments", "built_through", "hits")
        assert [[e[k] for k in kept] for e in after] == [[e[k] for k in kept] for e in before]
        finished = turn(runtime, "agent", about(1, rng, 6), max_tokens=3)
        assert runtime._engine.episodes.folds.made == 0
        assert memory(finished)["state_before"] == "warm"
        assert f"episode {asked[1]}" in runtime.explain("agent")["memory"][0]
    finally:
        runtime.close()
