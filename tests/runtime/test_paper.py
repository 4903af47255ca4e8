"""KVCOMM as its paper has it, in a daemon whose anchors are kept in its way."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem.compose.composer import Composer
from agentmem.errors import BadRequest
from agentmem.runtime import Runtime
from tests.runtime.agents import cached, memory, open_runtime, turn
from tests.runtime.test_composed import (
    DOCUMENTS,
    ENOUGH,
    JUDGE,
    SOLVER,
    check,
    drop_exact_state,
    read,
    taught,
)

SHORT = min(DOCUMENTS[:ENOUGH], key=len)
"""Anchors of all the others are as long."""
LONGER = " ".join(DOCUMENTS[ENOUGH:])


def composer(runtime: Runtime) -> Composer:
    found = runtime._engine.composing.composer
    assert not isinstance(found, str)
    return found


def anchors(runtime: Runtime) -> list[bool]:
    """Whether each one is whole."""
    return runtime._call(lambda: [anchor.whole for _, anchor in composer(runtime).library.pool.items()])


def test_the_paper_s_planner_asks_for_its_anchors(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    for ask in (
        lambda: runtime.create("a", {"planner": "paper"}),
        lambda: turn(runtime, "b", "hello", reuse="composed", planner="paper"),
        lambda: runtime.composed.verify(planner="paper"),
    ):
        with pytest.raises(BadRequest, match='set compose_anchors to "paper"') as refused:
            ask()
        assert refused.value.param == "planner"
    assert runtime.agents() == []
    runtime.close()


@pytest.mark.slow
def test_a_prompt_is_composed_where_one_anchor_is_clearly_the_nearest(tmp_path: Path) -> None:
    """A text that was read in its very place before is its own nearest; one that is longer than all anchors is read."""
    runtime = open_runtime(tmp_path, compose_anchors="paper")
    taught(runtime)
    assert set(anchors(runtime)) == {True}
    runtime.create("plain", {"planner": "paper", "reuse": "composed"})
    want = read(runtime, "judge", JUDGE, SHORT, "dense", reuse="off", max_tokens=16).end()
    drop_exact_state(runtime)
    end = read(runtime, "judge", JUDGE, SHORT, "again", planner="paper", max_tokens=16).end()
    assert cached(end) < 64
    told = runtime.explain("judge", "again")
    assert told["planner"] == "paper"
    assert memory(end)["composed_tokens"] >= len(SHORT.encode()) - 1
    assert "composed from 1 anchor" in told["composition"][0]
    assert end.text.startswith(want.text[:4]), (
        "what it is set off by comes from all of them, and is packed in 2 bits"
    )
    read(runtime, "solver", SOLVER, LONGER, "long").end()
    read(runtime, "judge", JUDGE, LONGER, "long", planner="paper").end()
    (why,) = runtime.explain("judge", "long")["composition"]
    assert why.startswith("not composed: too few anchors as long, or none clearly the nearest, for")
    check(runtime)
    runtime.close()


@pytest.mark.slow
def test_anchors_of_the_one_way_and_of_the_other(tmp_path: Path) -> None:
    """Whole ones serve the other planners too; of others there is not enough, and they go."""
    runtime = open_runtime(tmp_path)
    taught(runtime)
    ours = anchors(runtime)
    assert set(ours) == {False}
    runtime.close()
    runtime = open_runtime(tmp_path, compose_anchors="paper")
    assert anchors(runtime) == []
    drop_exact_state(runtime)
    for number, text in enumerate(DOCUMENTS[:ENOUGH]):
        read(runtime, "judge", JUDGE, text, f"more{number}").end()
    assert anchors(runtime) == [True] * ENOUGH
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert anchors(runtime) == [True] * ENOUGH
    end = read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH], "new").end()
    assert memory(end)["composed_tokens"] > 100
    assert f"from {ENOUGH} anchors" in runtime.explain("judge", "new")["composition"][0]
    check(runtime)
    runtime.close()
