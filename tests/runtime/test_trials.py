"""Composed prompts are measured against dense ones: before `auto` may compose, and again and again afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.compose.composer import Composer
from agentmem.compose.ledger import Bounds
from agentmem.errors import BadRequest, NotFound
from agentmem.runtime import Runtime
from tests.runtime.agents import memory, open_runtime
from tests.runtime.test_composed import DOCUMENTS, ENOUGH, JUDGE, check, read, taught

LOOSE = Bounds(pairs=3, kl=1e6)
"""A random model predicts nothing in particular."""


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    runtime = open_runtime(tmp_path)
    taught(runtime, len(DOCUMENTS))
    read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH], "more", reuse="auto").end()
    runtime._call(lambda: setattr(composer(runtime).ledger, "bounds", LOOSE))
    yield runtime
    runtime.close()


def composer(runtime: Runtime) -> Composer:
    found = runtime._engine.composing.composer
    assert not isinstance(found, str)
    return found


def of_judge(found: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in found["templates"] if row["agents"] == ["judge"])


@pytest.mark.slow
def test_auto_composes_what_was_measured_and_nothing_else(runtime: Runtime) -> None:
    assert runtime.explain("judge", "more")["composed_tokens"] == 0
    assert "not calibrated" in runtime.explain("judge", "more")["composition"][0]
    row = of_judge(runtime.composed.verify())
    assert row["pairs"] >= ENOUGH
    assert row["verdict"] == "holds"
    assert row["kl"] > 0
    assert 0 <= row["top1"] <= 1
    after = read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH + 1], "after", reuse="auto").end()
    assert memory(after)["composed_tokens"] > 100
    check(runtime)


@pytest.mark.slow
@pytest.mark.parametrize("planner", ["lego", "blend"])
def test_each_planner_is_measured_for_itself(runtime: Runtime, planner: str) -> None:
    """What holds for one says nothing of another; an agent's planner is the one that its prompts are composed by."""
    row = of_judge(runtime.composed.verify(planner=planner))
    assert (row["planner"], row["verdict"]) == (planner, "holds")
    assert row["pairs"] >= ENOUGH
    read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH + 1], "before", reuse="auto").end()
    assert runtime.explain("judge", "before")["composition"] == [
        "not composed: this template is not calibrated"
    ]
    runtime.set_policy("judge", {"planner": planner})
    after = read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH + 2], "after", reuse="auto").end()
    assert memory(after)["composed_tokens"] > 100
    told = runtime.explain("judge", "after")
    assert told["planner"] == planner
    assert told["composition"][0].endswith("moved")
    read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH + 2], "asked", reuse="auto", planner="kvcomm").end()
    assert "not calibrated (planner kvcomm)" in runtime.explain("judge", "asked")["composition"][0]
    with pytest.raises(BadRequest, match="there is no planner"):
        runtime.composed.verify(planner="dense")
    check(runtime)


@pytest.mark.slow
@pytest.mark.parametrize("planner", ["lego", "blend"])
def test_an_audit_is_of_the_planner_that_composed(runtime: Runtime, planner: str) -> None:
    runtime._call(lambda: setattr(composer(runtime), "audit_share", 1.0))
    read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH + 1], "a", planner=planner).end()
    deadline = time.monotonic() + 20
    while not runtime._call(lambda: audited(runtime)) and time.monotonic() < deadline:
        time.sleep(0.02)
    records = [r for e in composer(runtime).ledger.entries.values() for r in e.records]
    assert records == [planner]
    check(runtime)


def test_its_own_anchor_is_no_help_in_a_calibration(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that was read in its very place would be put as it was, and nearly nothing would be lost."""
    row = of_judge(runtime.composed.verify())
    pool = composer(runtime).library.pool

    without = pool.without
    monkeypatch.setattr(pool, "without", lambda texts: without(()))
    assert of_judge(runtime.composed.verify())["kl"] < 0.8 * row["kl"]


def test_a_template_without_anchors_has_no_pairs(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    assert runtime.composed.verify() == {"templates": [], "bounds": {"pairs": 20, "kl": Bounds().kl}}
    read(runtime, "judge", JUDGE, DOCUMENTS[0], "a").end()
    (row,) = runtime.composed.verify()["templates"]
    assert (row["pairs"], row["kl"], row["verdict"]) == (0, None, "this template is not calibrated")
    runtime.close()


def audited(runtime: Runtime) -> list[float]:
    return [
        kl for e in composer(runtime).ledger.entries.values() for r in e.records.values() for kl in r.audits
    ]


@pytest.mark.slow
def test_an_audit_learns_and_demotes(runtime: Runtime) -> None:
    """Every composed prompt is audited here; the bound is one that no template keeps."""
    runtime.composed.verify()
    runtime._call(lambda: setattr(composer(runtime), "audit_share", 1.0))
    runtime._call(lambda: setattr(composer(runtime).ledger, "bounds", Bounds(pairs=3, kl=0.0)))
    anchors = runtime._call(lambda: len(composer(runtime).library.pool))
    end = read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH + 1], "a").end()
    assert memory(end)["composed_tokens"] > 100
    deadline = time.monotonic() + 20
    while not runtime._call(lambda: audited(runtime)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(runtime._call(lambda: audited(runtime))) == 1
    assert runtime._call(lambda: len(composer(runtime).library.pool)) == anchors + 1
    runtime._call(lambda: setattr(composer(runtime).ledger, "bounds", LOOSE))
    read(runtime, "judge", JUDGE, DOCUMENTS[ENOUGH + 2], "b", reuse="auto").end()
    assert "demoted" in runtime.explain("judge", "b")["composition"][0]
    check(runtime)


def test_a_trial_makes_way_for_a_request(runtime: Runtime) -> None:
    """It holds nothing while somebody speaks, begins anew, and ends with the daemon."""
    rows: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: rows.append(runtime.composed.verify()))
    asking.start()
    for n in range(3):
        read(runtime, "plain", JUDGE, f"{n} {DOCUMENTS[0]}", f"p{n}", reuse="exact").end()
    asking.join(60)
    assert of_judge(rows[0])["pairs"] >= ENOUGH
    asking = threading.Thread(target=lambda: rows.append(runtime.composed.verify()))
    asking.start()
    runtime.close()
    asking.join(60)
    assert not asking.is_alive()


def test_templates_and_documents_are_declared_and_kept(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    runtime.composed.declare("default", "ask", "The question is {{question}}. Answer it.")
    assert runtime.composed.register("default", "spec.md", DOCUMENTS[0]) == len(DOCUMENTS[0].encode())
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert runtime.composed.template("default", "ask") == "The question is {{question}}. Answer it."
    assert runtime.composed.documents("default") == {"spec.md": len(DOCUMENTS[0].encode())}
    assert runtime.composed.documents("other") == {}
    for n, (agent, system) in enumerate((("solver", "You solve."), ("judge", JUDGE))):
        for number, text in enumerate(DOCUMENTS[n:]):
            read(runtime, agent, system, text, f"s{number}").end()
    end = read(runtime, "judge", JUDGE, DOCUMENTS[0], "new").end()
    assert memory(end)["composed_tokens"] > 100
    assert (
        "tokens of document 'spec.md' composed from 5 anchors"
        in runtime.explain("judge", "new")["composition"][0]
    )
    with pytest.raises(BadRequest, match="slot"):
        runtime.composed.declare("default", "bad", "no slot at all")
    runtime.composed.withdraw("default", "ask")
    runtime.composed.unregister("default", "spec.md")
    for gone in (
        lambda: runtime.composed.template("default", "ask"),
        lambda: runtime.composed.unregister("default", "spec.md"),
    ):
        with pytest.raises(NotFound):
            gone()
    runtime.close()
