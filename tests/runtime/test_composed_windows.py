"""Models with windowed layers are not composed (invariant 25 asks what their ring buffers would hold): they say so, and read."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem.engine.request import ChatRequest, Finished
from agentmem.errors import BadRequest
from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, Running, memory
from tests.runtime.test_layouts import opened

WINDOWS = {"window": 96, "sinks": 40}


def said(runtime: Runtime, agent: str, window: int, reuse: str | None) -> Finished:
    """A text longer than the window, and a reply of twice its length."""
    messages = [{"role": "system", "content": f"You are {agent}. " * 3}, {"role": "user", "content": LONG}]
    return Running(
        runtime, ChatRequest(agent, messages, max_tokens=2 * window, top_logprobs=20, reuse=reuse)
    ).end()


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("reuse", ["composed", "auto"])
def test_agents_may_not_compose(tmp_path: Path, kind: str, reuse: str) -> None:
    runtime = opened(tmp_path, kind)
    runtime.create("known", {})
    for refuse in (
        lambda: runtime.create("new", {"reuse": reuse}),
        lambda: runtime.set_policy("known", {"reuse": reuse}),
    ):
        with pytest.raises(BadRequest, match="cannot be moved") as refused:
            refuse()
        assert (refused.value.status, refused.value.param) == (400, "reuse")
    with pytest.raises(BadRequest, match="cannot be blended") as refused:
        runtime.create("new", {"planner": "blend"})
    assert refused.value.param == "planner"
    assert [(a["agent"], a["reuse"]) for a in runtime.agents()] == [("known", "exact")]
    runtime.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", WINDOWS)
def test_who_asks_all_the_same_is_read_and_hears_why(tmp_path: Path, kind: str) -> None:
    """All along a reply of two windows it is as if nobody had asked; nothing is learned of it."""
    runtime = opened(tmp_path / "composed", kind)
    for agent in ("solver", "judge"):
        got = said(runtime, agent, WINDOWS[kind], "composed")
        assert memory(got)["composed_tokens"] == 0
        told = runtime.explain(agent)
        assert told["reuse"] == "exact"
        assert told["composition"] == ["not composed: the layers of this model are not all plain attention"]
    assert runtime._engine.composing.made is None
    assert not runtime._settings.paths.composed.exists()
    runtime.close()
    runtime = opened(tmp_path / "exact", kind)
    said(runtime, "solver", WINDOWS[kind], None)
    assert said(runtime, "judge", WINDOWS[kind], None).logprobs == got.logprobs
    runtime.close()
