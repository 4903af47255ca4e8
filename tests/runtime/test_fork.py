"""Forks share everything with their parent and then go their own way; prefixes of agents exist once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import AlreadyExists, BadRequest, NotFound
from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, Running, ask, cached, extents, memory, open_runtime, turn


def text(runtime: Runtime, agent: str, question: str, **options: Any) -> str:
    return turn(runtime, agent, question, **options).text


def test_a_fork_answers_like_its_parent_and_costs_nothing(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "planner", LONG)
    before = runtime.store()
    fork = runtime.fork("planner", "coder")
    after = runtime.store()
    assert after["ram"]["used_bytes"] == before["ram"]["used_bytes"]
    assert after["disk"]["extent_bytes"] == before["disk"]["extent_bytes"]
    assert fork["lineage"] == {"parent": "planner", "session": "default", "turn": 1}
    assert fork["unique_bytes"] == 0
    assert fork["shared_bytes"] > 0
    assert (fork["state"], fork["tokens"]) == ("hot", runtime.agent("planner")["tokens"])
    one, two = turn(runtime, "planner", "go on"), turn(runtime, "coder", "go on")
    assert one.text == two.text
    assert memory(two)["prefilled_tokens"] <= memory(one)["prefilled_tokens"] < 60
    runtime.close()


def test_each_goes_its_own_way(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path / "a")
    turn(runtime, "planner", LONG)
    runtime.fork("planner", "coder")
    planner, coder = text(runtime, "planner", "left?"), text(runtime, "coder", "right, to the sea?")
    again = text(runtime, "planner", "and then?")
    runtime.close()
    for agent, way, want in (
        ("planner", ["left?", "and then?"], [planner, again]),
        ("coder", ["right, to the sea?"], [coder]),
    ):
        runtime = open_runtime(tmp_path / agent)
        turn(runtime, agent, LONG)
        assert [text(runtime, agent, q) for q in way] == want
        runtime.close()


def test_a_fork_of_an_earlier_turn_survives_its_parent_and_a_restart(tmp_path: Path) -> None:
    # In 8 bits: the fork finds rows packed that its parent still had whole.
    runtime = open_runtime(tmp_path, kv_format="q8-plain")
    turn(runtime, "planner", LONG)
    second = text(runtime, "planner", "the second")
    turn(runtime, "planner", "the third")
    fork = runtime.fork("planner", "early", at=1)
    grandchild = runtime.fork("early", "child")
    assert fork["lineage"]["turn"] == grandchild["lineage"]["turn"] == 1
    assert fork["tokens"] < runtime.agent("planner")["tokens"]
    runtime.forget("planner")
    runtime.close()
    runtime = open_runtime(tmp_path, kv_format="q8-plain")
    for name in ("early", "child"):
        finished = turn(runtime, name, "the second")
        assert finished.text == second
        assert memory(finished)["state_before"] in ("warm", "hot")
        assert memory(finished)["prefilled_tokens"] < 100
    runtime.forget("early")
    runtime.close()
    runtime = open_runtime(tmp_path, kv_format="q8-plain")
    assert [a["agent"] for a in runtime.agents()] == ["child"]
    assert runtime.agent("child")["turns"] == 1
    turn(runtime, "child", "still here?")
    runtime.close()


def test_what_cannot_be_forked_is_refused(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "planner", "hello")
    turn(runtime, "coder", "hello")
    with pytest.raises(AlreadyExists, match="coder"):
        runtime.fork("planner", "coder")
    for at in (0, 2, -1):
        with pytest.raises(BadRequest, match="turns 1 to 1"):
            runtime.fork("planner", "other", at=at)
    with pytest.raises(NotFound):
        runtime.fork("nobody", "other")
    with pytest.raises(NotFound, match="session"):
        runtime.fork("planner", "other", session="none")
    assert [a["agent"] for a in runtime.agents()] == ["coder", "planner"]
    runtime.close()


def test_agents_that_start_alike_at_the_same_time_hold_one_copy(tmp_path: Path) -> None:
    """Both prefill, because neither could know of the other; where the bits are the same, one copy stays."""
    runtime = open_runtime(tmp_path)
    system = {"role": "system", "content": LONG}
    running = [Running(runtime, _with_system(name, system)) for name in ("a", "b", "c")]
    for r in running:
        r.end()
    infos = [runtime.agent(n) for n in ("a", "b", "c")]
    total = runtime.store()
    assert all(i["unique_bytes"] < 0.2 * i["shared_bytes"] for i in infos)
    assert total["unique_bytes"] < 0.5 * total["without_sharing_bytes"]
    assert sum(p.stat().st_size for p in extents(tmp_path)) < 0.5 * total["without_sharing_bytes"] + 3 * 8192
    late = Running(runtime, _with_system("d", system)).end()
    assert cached(late) > 0.8 * late.usage["prompt_tokens"]
    runtime.close()


def _with_system(agent: str, system: dict[str, Any]) -> Any:
    request = ask(agent, f"I am {agent}")
    request.messages.insert(0, system)
    return request
