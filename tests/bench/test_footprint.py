"""What `bench bytes` computes is what an agent takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from agentmem.bench import footprint
from agentmem.bench.footprint import PAGE, SHAPES, Agent, Shape, measure, table


def small(name: str, window: int = 0) -> Shape:
    """The shape with its first layers only, and another window."""
    whole = SHAPES[name]
    parts = tuple(dataclasses.replace(p, window=window) if p.window else p for p in whole.parts[:6])
    return dataclasses.replace(whole, parts=parts)


@pytest.mark.parametrize("tokens", [40, PAGE, PAGE + 1, 700, 1024])
@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Gemma-3-12B", "DeepSeek-V2-Lite"])
def test_files_hold_what_was_computed(tmp_path: Path, name: str, tokens: int) -> None:
    agent = Agent(tmp_path, small(name, 256), "q4", tokens)
    computed = agent.computed()
    used, files = agent.write()
    assert computed <= files < computed + 40_000  # headers, checksums, token ids
    slots = agent.geometry.slot_bytes
    assert computed - slots < used <= computed + 4 * slots


def test_a_window_keeps_an_agent_small(tmp_path: Path) -> None:
    short, long = (
        Agent(tmp_path / str(n), small("Gemma-3-12B", 256), "q4", n).computed() for n in (1024, 4096)
    )
    assert long < 2.5 * short  # one layer of six grows
    assert measure(["Gemma-3-12B"], [32768], written=[])["rows"][0]["of_paper"] < 0.22


def test_bounds_are_checked_on_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(footprint.SHAPES, "tiny", small("DeepSeek-V2-Lite"))
    monkeypatch.setitem(footprint.BOUNDS, ("tiny", 512), 0.0001)
    result = measure(["tiny"], [256, 512], written=[512])
    assert [c["holds"] for c in result["checks"]] == [False, True]
    assert result["rows"][0]["file_bytes"] is None
    assert result["rows"][1]["agents"] > 3 * result["rows"][1]["agents_paper"]
    assert "| tiny | 512 |" in table(result)
