"""Small extents of long sessions are merged, without a change of any bit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, cached, extents, memory, open_runtime, turn

TURNS = 40


def quiet(runtime: Runtime) -> None:
    while runtime._call(lambda: runtime._memory.unwritten):
        time.sleep(0.005)


def live(runtime: Runtime, agent: str, turns: int) -> list[str]:
    return [turn(runtime, agent, f"and {i}?", max_tokens=3).text for i in range(turns)]


def test_a_long_session_lies_in_few_extents_of_packed_rows(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    live(runtime, "ada", TURNS)
    quiet(runtime)
    store, info = runtime.store(), runtime.agent("ada")
    assert store["disk"]["compactions"] >= 3
    assert len(extents(tmp_path)) == store["disk"]["extents"] <= 16
    pieces = runtime._call(
        lambda: [x for p in runtime._memory.find("default", "ada").pages() for x in p.pieces or ()]
    )
    packed = sum(x.rows for x in pieces if not x.raw)
    assert packed > 0.5 * sum(x.rows for x in pieces)
    assert info["disk_bytes"] < 0.7 * info["fp16_bytes"]
    runtime.close()


@pytest.mark.slow
def test_a_merged_session_continues_like_one_that_never_stopped(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path / "whole")
    want = live(runtime, "ada", TURNS + 2)
    runtime.close()
    runtime = open_runtime(tmp_path / "parts")
    assert live(runtime, "ada", TURNS) == want[:TURNS]
    quiet(runtime)
    runtime.evict("ada")
    one = turn(runtime, "ada", f"and {TURNS}?", max_tokens=3)
    assert (one.text, memory(one)["state_before"]) == (want[TURNS], "warm")
    runtime.close()
    runtime = open_runtime(tmp_path / "parts")
    two = turn(runtime, "ada", f"and {TURNS + 1}?", max_tokens=3)
    assert (two.text, memory(two)["state_before"]) == (want[TURNS + 1], "warm")
    assert memory(two)["prefilled_tokens"] < 40
    runtime.close()


@pytest.mark.slow
def test_forks_of_merged_sessions_keep_their_state(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", LONG)
    runtime.fork("ada", "bob")
    live(runtime, "ada", 20)
    quiet(runtime)
    assert runtime.store()["disk"]["compactions"] >= 1
    runtime.evict("ada")
    runtime.evict("bob")
    finished = turn(runtime, "bob", "go on")
    assert cached(finished) > 300
    runtime.forget("ada")
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert cached(turn(runtime, "bob", "again")) > 300
    assert runtime.store()["disk"]["quarantined"] == 0
    runtime.close()
