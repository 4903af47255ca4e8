"""Disk budgets, quotas, pins, prune, and agents that never touch the disk."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import BadRequest, ContextOverflow
from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, Running, ask, cached, extents, memory, open_runtime, turn

KIB = 1 << 10


def on_disk(home: Path) -> int:
    """What `du` counts below the store, in bytes."""
    return sum(p.stat().st_blocks * 512 for p in (home / "store").rglob("*") if p.is_file())


def idle(runtime: Runtime) -> None:
    """Wait until nothing is being written."""
    while runtime._call(lambda: runtime._memory.unwritten or runtime._budget._evicting):
        time.sleep(0.005)


def fill(runtime: Runtime, names: list[str], **options: Any) -> None:
    for name in names:
        turn(runtime, name, f"{name}: {LONG}", **options)
    idle(runtime)


def test_the_disk_stays_within_its_budget_and_the_oldest_state_goes(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path / "probe")
    fill(runtime, ["a0"])
    each = runtime.store()["disk"]["extent_bytes"]
    runtime.close()
    names = [f"a{i}" for i in range(20)]
    budget = 8 * each + (2 << 20)
    runtime = open_runtime(tmp_path / "home", disk_budget=budget)
    for name in names:
        fill(runtime, [name])
        assert on_disk(tmp_path / "home") <= budget + 4096 * 16
    disk = runtime.store()["disk"]
    assert disk["exceeded"] is None
    assert disk["evicted_bytes"] >= 5 * each
    assert (
        abs(on_disk(tmp_path / "home") - runtime.store()["disk"]["bytes"]) < 0.05 * disk["bytes"] + 4096 * 8
    )
    runtime.close()
    runtime = open_runtime(tmp_path / "home", disk_budget=budget)
    states = {a["agent"]: a["state"] for a in runtime.agents()}
    assert sorted(states) == sorted(names)
    assert states["a19"] == "warm"
    assert states["a0"] == states["a1"] == "cold"
    for name in ("a0", "a19"):
        finished = turn(runtime, name, "what did I say?")
        assert (cached(finished) > 64) == (name == "a19")
        assert finished.usage["prompt_tokens"] > 200
    runtime.close()


def test_a_pinned_agent_stays_while_others_go(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    fill(runtime, ["keep"])
    assert runtime.set_policy("keep", {"pinned": True})["pinned"]
    size = runtime.store()["disk"]["extent_bytes"] + runtime.store()["disk"]["index_bytes"]
    runtime.close()
    runtime = open_runtime(tmp_path, disk_budget=3 * size)
    assert runtime.agent("keep")["pinned"]
    fill(runtime, [f"a{i}" for i in range(8)])
    assert runtime.store()["disk"]["evicted_bytes"] > 0
    runtime.evict("keep")
    assert runtime.agent("keep")["state"] == "warm"
    runtime.set_policy("keep", {"pinned": False})
    assert not runtime.agent("keep")["pinned"]
    runtime.close()


@pytest.mark.parametrize("limit", ["disk_budget", "agent_quota", "namespace_quota"])
def test_what_cannot_be_kept_is_named(tmp_path: Path, limit: str) -> None:
    runtime = open_runtime(tmp_path, **{limit: 1})
    runtime.create("keep", {"pinned": True})
    fill(runtime, ["keep"])
    named = {"agent_quota": "quota of agent keep", "namespace_quota": "quota of namespace default"}
    assert runtime.store()["disk"]["exceeded"] == named.get(limit, limit)
    assert runtime.agent("keep")["disk_bytes"] > 0
    runtime.close()


def test_a_quota_makes_room_among_the_agents_own_sessions(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    fill(runtime, ["other"])
    one = runtime.agent("other")["unique_bytes"]
    runtime.create("small", {"quota_bytes": int(2.5 * one)})
    for session in ("s1", "s2", "s3", "s4"):
        turn(runtime, "small", f"{session}: {LONG}", session=session)
        idle(runtime)
        used = runtime.agent("small")["unique_bytes"] + runtime.agent("small")["shared_bytes"]
        assert used <= 2.5 * one
    assert runtime.agent("other")["unique_bytes"] == one
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert runtime.agent("small")["quota_bytes"] == int(2.5 * one)
    assert cached(turn(runtime, "small", "go on", session="s4")) > 0
    assert cached(turn(runtime, "small", "go on", session="s1")) < 64
    runtime.close()


def test_a_namespace_quota_leaves_other_namespaces_alone(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    fill(runtime, ["a"], namespace="full")
    one = runtime.agent("a", "full")["unique_bytes"]
    runtime.close()
    runtime = open_runtime(tmp_path, namespace_quota=int(2.5 * one))
    fill(runtime, ["x", "y"], namespace="free")
    fill(runtime, ["b", "c", "d"], namespace="full")
    used = runtime.store()["namespaces"]
    assert used["full"]["unique_bytes"] <= 2.5 * one
    assert used["free"]["unique_bytes"] >= 1.9 * one
    assert cached(turn(runtime, "d", "go on", namespace="full")) > 0
    runtime.close()


def test_the_floor_of_free_disk_is_never_touched(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    runtime = open_runtime(tmp_path, disk_floor=free.f_frsize * free.f_bavail * 4)
    finished = turn(runtime, "ada", LONG)
    assert not memory(finished)["committed"]
    assert extents(tmp_path) == []
    idle(runtime)
    assert runtime.store()["disk"]["disk_full"]
    assert runtime.store()["disk"]["exceeded"] == "disk_floor"
    assert runtime.health()["status"] == "degraded"
    assert cached(turn(runtime, "ada", "go on")) > 0
    runtime.close()


def test_state_evicted_from_disk_stays_hot_until_room_is_needed(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    fill(runtime, ["ada", "bob"])
    result = runtime.prune(0.0)
    assert result["agents"] == ["ada", "bob"]
    assert result["bytes_freed"] == result["bytes"] > 0
    assert extents(tmp_path) == []
    assert runtime.agent("ada")["state"] == "hot"
    finished = turn(runtime, "ada", "go on")
    assert memory(finished)["prefilled_tokens"] < 60
    assert memory(finished)["committed"]
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert {a["agent"]: a["state"] for a in runtime.agents()} == {"ada": "warm", "bob": "cold"}
    assert turn(runtime, "bob", "go on").usage["prompt_tokens"] > 200
    runtime.close()


def test_state_that_is_to_be_kept_stays_until_its_time_is_over(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", "The lighthouse keeper counts the ships. " * 8, keep_s=3600.0)
    runtime.prune(0.0)
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert cached(turn(runtime, "ada", "go on")) > 200
    runtime.set_policy("ada", {"keep_until": time.time() - 1})
    runtime.prune(0.0)
    runtime.close()
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", "and on")
    assert runtime.explain("ada")["reason"] == "expired"
    runtime.close()


def test_explain_says_that_state_had_left_the_disk(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    fill(runtime, ["ada", "bob"])
    assert runtime.explain("ada")["reason"] == "new_session"
    runtime.prune(0.0)
    turn(runtime, "bob", "go on")  # still in RAM
    assert runtime.explain("bob")["reason"] == "extended"
    runtime.close()
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", "go on")
    told = runtime.explain("ada")
    assert told["reason"] == "evicted"
    assert told["exact_tokens"] < 64 < told["kept_tokens"] == told["session_tokens_before"]
    assert told["prefilled_tokens"] > 200
    for agent in ("ada", "bob"):
        turn(runtime, agent, "and on")
        assert runtime.explain(agent)["reason"] == "extended"
    runtime.close()


def test_prune_spares_the_young_and_the_pinned_and_can_only_look(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    fill(runtime, ["old", "pin", "young"])
    runtime.set_policy("pin", {"pinned": True})
    runtime._call(
        lambda: [setattr(a.row, "last_used", 0.0) for a in runtime._memory.agents() if a.row.name != "young"]
    )
    before = runtime.store()["disk"]["extent_bytes"]
    seen = runtime.prune(3600.0, dry_run=True)
    assert seen["agents"] == ["old"]
    assert runtime.store()["disk"]["extent_bytes"] == before
    gone = runtime.prune(3600.0)
    assert (gone["agents"], gone["bytes"]) == (seen["agents"], seen["bytes"])
    assert runtime.store()["disk"]["extent_bytes"] == before - gone["bytes_freed"]
    assert runtime.prune(3600.0)["agents"] == []
    runtime.close()


def test_an_ephemeral_agent_never_touches_the_disk(tmp_path: Path) -> None:
    marker = "the harbour at zanzibar"
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", "hello")
    idle(runtime)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    first = turn(runtime, "ghost", f"{marker} {LONG}", persist=False)
    assert not memory(first)["committed"]
    second = turn(runtime, "ghost", "go on")
    assert cached(second) > 200
    fork = runtime.fork("ghost", "shade")
    assert (fork["persist"], fork["disk_bytes"]) == (False, 0)
    turn(runtime, "shade", "and you?")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    runtime.forget("shade")
    runtime.close()
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert marker.encode() not in everything
    runtime = open_runtime(tmp_path)
    assert [a["agent"] for a in runtime.agents()] == ["ada"]
    runtime.close()


@pytest.mark.slow
def test_ephemeral_state_makes_room_for_others_and_is_computed_anew(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path / "a")
    used = []
    for name in ("g0", "g1"):
        fill(runtime, [name], persist=False)
        used.append(runtime.store()["ram"]["used_bytes"])
    want = turn(runtime, "g0", "go on").text
    runtime.close()
    runtime = open_runtime(tmp_path / "b", ram_budget=4 * used[0])
    names = [f"g{i}" for i in range(12)]
    fill(runtime, names, persist=False)
    assert {a["state"] for a in runtime.agents()} >= {"hot"}
    again = turn(runtime, "g0", "go on")
    assert again.text == want
    assert cached(again) < 200
    fill(runtime, ["solid"])
    runtime.evict("solid")
    assert cached(turn(runtime, "solid", "go on")) > 200
    assert runtime.store()["disk"]["extents"] >= 1
    runtime.close()


def test_persist_is_settled_when_an_agent_is_made(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "ada", "hello")
    turn(runtime, "ghost", "hello", persist=False)
    for name, persist in (("ada", False), ("ghost", True)):
        with pytest.raises(BadRequest, match="persist"):
            Running(runtime, ask(name, "again", persist=persist)).end()
    assert Running(runtime, ask("ghost", "again", persist=False)).end().text
    runtime.close()


def test_an_agent_made_on_purpose_outlives_a_request_that_fails(tmp_path: Path) -> None:
    """Forgotten in RAM alone, it would come back under another id, which the index refuses."""
    runtime = open_runtime(tmp_path)
    runtime.create("ada", {"pinned": True})
    for _ in range(2):
        with pytest.raises(ContextOverflow):
            turn(runtime, "ada", "hello", max_tokens=10**6)
        assert runtime.agent("ada")["pinned"]
        runtime.close()
        runtime = open_runtime(tmp_path)
    assert memory(turn(runtime, "ada", "hello"))["committed"]
    assert runtime.health()["status"] == "ok"
    runtime.close()


@pytest.mark.slow
def test_state_of_another_format_goes_before_any_that_is_of_use(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path, kv_format="q8-plain")
    fill(runtime, [f"old{i}" for i in range(6)])
    size = on_disk(tmp_path)
    runtime.close()
    runtime = open_runtime(tmp_path, disk_budget=size)
    fill(runtime, ["new0", "new1", "new2"])
    disk = runtime.store()["disk"]
    assert disk["evicted_bytes"] > 0
    assert disk["bytes"] <= size
    runtime.close()
    runtime = open_runtime(tmp_path, disk_budget=size)
    assert {runtime.agent(f"new{i}")["state"] for i in range(3)} == {"warm"}
    runtime.close()
    runtime = open_runtime(tmp_path, kv_format="q8-plain")
    assert runtime.agent("old0")["state"] == "cold"
    assert turn(runtime, "old0", "go on").usage["prompt_tokens"] > 200
    runtime.close()
