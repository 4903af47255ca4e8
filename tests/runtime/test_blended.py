"""CacheBlend in a daemon: texts of colleagues are moved, and the tokens read anew whose values differ most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.compose import composer as composing
from agentmem.compose.blend import RATIO
from agentmem.engine.request import Started
from agentmem.errors import BadRequest
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.runtime.agents import BUDGET, cached, memory, open_runtime, turn
from tests.runtime.test_composed import (
    DOCUMENTS,
    ENOUGH,
    JUDGE,
    SOLVER,
    check,
    read,
    taught,
)

NEW = DOCUMENTS[ENOUGH]


def opened(home: Path, kind: str, **options: Any) -> Runtime:
    settings = Settings(home=home, ram_budget=BUDGET, itl_target_ms=1e6)
    return Runtime.open(settings, lambda: random_model(kind, seed=0, **options))


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    runtime = opened(tmp_path, "llama", num_hidden_layers=4)
    taught(runtime)
    yield runtime
    runtime.close()


def test_a_text_that_another_agent_has_read_is_blended(runtime: Runtime) -> None:
    """What is read anew counts as read; announcement, usage and explanation agree."""
    running = read(runtime, "judge", JUDGE, NEW, "new", planner="blend")
    end = running.end()
    started, told = running.events[0], runtime.explain("judge", "new")
    assert isinstance(started, Started)
    kept = memory(end)["composed_tokens"]
    assert started.composed_tokens == kept == told["composed_tokens"]
    assert (told["reuse"], told["planner"]) == ("composed", "blend")
    *moved, again = told["composition"]
    put, anew = sum(int(line.split()[0]) for line in moved), int(again.split()[0])
    assert put >= len(NEW.encode())
    assert all(line.endswith("moved") for line in moved)
    assert again == f"{int(RATIO * put)} of these tokens read anew"
    assert kept == put - anew
    assert memory(end)["prefilled_tokens"] == end.usage["prompt_tokens"] - cached(end) - kept
    check(runtime)


@pytest.mark.parametrize("planner", ["blend", "lego"])
def test_one_text_is_enough(tmp_path: Path, planner: str) -> None:
    """No anchors are asked for."""
    runtime = open_runtime(tmp_path)
    read(runtime, "solver", SOLVER, NEW, "a").end()
    read(runtime, "judge", JUDGE, DOCUMENTS[0], "a").end()
    dense = read(runtime, "judge", JUDGE, NEW, "b").end()
    assert memory(dense)["composed_tokens"] == 0
    read(runtime, "other", JUDGE + " Be brief.", NEW, "b", planner=planner).end()
    assert runtime.explain("other", "b")["composed_tokens"] > 0.7 * len(NEW.encode())
    runtime.close()


def test_what_was_blended_is_never_exact(runtime: Runtime) -> None:
    """Who asks exactly afterwards finds what stood in front of it, and says what it would have said."""
    fresh = read(runtime, "fresh", JUDGE, NEW, "a", reuse="exact", namespace="other", max_tokens=16).end()
    mixed = read(runtime, "judge", JUDGE, NEW, "a", planner="blend", max_tokens=16).end()
    assert memory(mixed)["composed_tokens"]
    exact = read(runtime, "judge", JUDGE, NEW, "b", reuse="exact", max_tokens=16).end()
    assert cached(exact) <= cached(mixed) + 1
    assert exact.text == fresh.text
    check(runtime)


def test_prompts_that_are_too_long_are_read(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composing, "MOST", 100)
    end = read(runtime, "judge", JUDGE, NEW, "new", planner="blend").end()
    assert memory(end)["composed_tokens"] == 0
    assert runtime.explain("judge", "new")["composition"] == [
        "not composed: prompts of more than 100 tokens are not blended"
    ]


def test_a_model_that_cannot_be_blended_says_so(tmp_path: Path) -> None:
    """To who asks for it; an agent that came from elsewhere with this planner has its prompts read."""
    runtime = opened(tmp_path, "gemma")  # it scales what its embedding gives
    for ask in (
        lambda: runtime.create("a", {"planner": "blend"}),
        lambda: turn(runtime, "b", "hello", reuse="composed", planner="blend"),
        lambda: runtime.composed.verify(planner="blend"),
    ):
        with pytest.raises(BadRequest, match="cannot be blended") as refused:
            ask()
        assert refused.value.param == "planner"
    assert runtime.agents() == []
    runtime.create("a", {"planner": "lego", "reuse": "composed"})

    def as_if_imported() -> None:
        runtime._memory.find("default", "a").row.policy["planner"] = "blend"

    runtime._call(as_if_imported)
    assert turn(runtime, "a", "hello").text
    assert "cannot be blended" in runtime.explain("a")["composition"][0]
    runtime.close()
