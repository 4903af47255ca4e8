"""One session of an agent is forgotten: its words, its state, what is hidden behind it; everything else stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import NotFound
from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, memory, open_runtime, turn
from tests.runtime.test_layouts import opened


def sessions(runtime: Runtime, agent: str = "a") -> Any:
    return runtime.agent(agent)["sessions"]


def test_its_bytes_are_freed_and_the_others_go_on(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "a", LONG, session="stays")
    before = runtime.store()
    turn(runtime, "a", f"something else: {LONG}", session="goes")
    turn(runtime, "a", "and more", session="goes")
    assert runtime.forget("a", session="goes")["bytes_freed"] > 10_000
    after = runtime.store()
    assert after["ram"]["used_bytes"] == before["ram"]["used_bytes"]
    assert after["disk"]["extent_bytes"] == before["disk"]["extent_bytes"]
    assert sessions(runtime) == ["stays"]
    with pytest.raises(NotFound, match="no session 'goes'"):
        runtime.forget("a", session="goes")
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert sessions(runtime) == ["stays"]
    assert memory(turn(runtime, "a", "go on", session="stays"))["prefilled_tokens"] < 60
    assert memory(turn(runtime, "a", "hello", session="goes"))["exact_tokens"] < 40
    assert not runtime.upkeep.verify(deep=True)["bad"]
    runtime.close()


def test_the_last_one_may_go_and_the_agent_stays(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    runtime.create("a", {"pinned": True})
    turn(runtime, "a", "hello")
    runtime.forget("a", session="default")
    assert sessions(runtime) == []
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert runtime.agent("a")["pinned"]
    turn(runtime, "a", "hello again")
    assert sessions(runtime) == ["default"]
    runtime.close()


def test_a_fork_keeps_what_it_began_with(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    turn(runtime, "a", LONG, session="one")
    want = turn(runtime, "a", "and then?", session="one").text
    runtime.fork("a", "b", session="one", at=1)
    runtime.forget("a", session="one")
    runtime.close()
    runtime = open_runtime(tmp_path)
    again = turn(runtime, "b", "and then?", session="one")
    assert again.text == want
    assert memory(again)["prefilled_tokens"] < 60
    runtime.close()


def test_checkpoints_go_with_it(tmp_path: Path) -> None:
    runtime = opened(tmp_path, "hybrid")
    turn(runtime, "a", LONG, session="stays")
    before = runtime.store()
    turn(runtime, "a", f"something else: {LONG}", session="goes")
    runtime.forget("a", session="goes")
    after = runtime.store()
    assert after["ram"]["used_bytes"] <= before["ram"]["used_bytes"]
    assert after["disk"]["extent_bytes"] == before["disk"]["extent_bytes"]
    assert memory(turn(runtime, "a", "go on", session="stays"))["prefilled_tokens"] < 60
    runtime.close()


def test_one_that_is_off_the_disk_goes_too(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    before = runtime.store()["ram"]["used_bytes"]
    turn(runtime, "a", LONG, persist=False)
    runtime.forget("a", session="default")
    assert runtime.store()["ram"]["used_bytes"] == before
    runtime.close()


@pytest.mark.slow
@pytest.mark.parametrize("session", [None, "default"])
def test_a_view_in_the_making_goes_too(tmp_path: Path, session: str | None) -> None:
    """What it held at that moment is free as well."""
    runtime = open_runtime(tmp_path, episode_encoder="hash512", ram_budget=32 << 20)
    policy = {"kind": "episodic", "budget_tokens": 1024, "block_tokens": 256, "episodes": 2}
    runtime.create("old", {"memory": policy})
    making = False
    for number in range(40):
        turn(runtime, "old", f"{number} {LONG}", max_tokens=1)
        making = runtime._call(lambda: runtime._engine.folds._job is not None)
        if making:
            break
    assert making
    runtime.forget("old", session=session)
    store = runtime.store()
    assert store["ram"]["used_bytes"] == 0
    assert store["disk"]["extent_bytes"] == 0
    runtime.close()
