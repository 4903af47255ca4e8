"""Homes that earlier releases left: this release opens them, knows everything, and goes on from their state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from agentmem import __version__
from agentmem.quant.device import backend
from tests.golden.make import FOLDER, KV_FORMAT, NEXT, make, told
from tests.runtime.agents import cached, memory, open_runtime, turn

HOMES = sorted(p.parent.name for p in FOLDER.glob("*/expected.json"))


def known(release: str) -> dict[str, Any]:
    """What the home of a release holds; its replies only where the model's arithmetic is that of the machine that made it."""
    expected: dict[str, Any] = json.loads((FOLDER / release / "expected.json").read_text())
    for facts in expected.values() if backend() != "cpu" else ():
        del facts["next"]
    return expected


@pytest.mark.parametrize("release", HOMES)
def test_the_home_of_a_release_is_read_and_goes_on(tmp_path: Path, release: str) -> None:
    expected = known(release)
    home = Path(shutil.copytree(FOLDER / release / "home", tmp_path / "home"))
    runtime = open_runtime(home, kv_format=KV_FORMAT)
    assert runtime._store.salvage is None
    assert told(runtime) == expected
    assert runtime.upkeep.verify(deep=True)["ok"]
    assert runtime.store()["disk"]["quarantined"] == 0
    runtime.close()


def test_a_home_of_the_former_default_format_keeps_its_words_and_state(tmp_path: Path) -> None:
    """Under today's default the agents speak on from their words; what they had is there again under their own format."""
    home = Path(shutil.copytree(FOLDER / "0.1.0" / "home", tmp_path / "home"))
    expected = known("0.1.0")
    runtime = open_runtime(home)
    assert {a["agent"] for a in runtime.agents()} == expected.keys()
    reply = turn(runtime, "bob", NEXT)
    assert (cached(reply), memory(reply)["state_before"]) == (0, "cold")
    assert reply.usage["prompt_tokens"] == expected["bob"]["prompt"]
    runtime.close()
    runtime = open_runtime(home, kv_format=KV_FORMAT)
    assert cached(turn(runtime, "ada", NEXT)) == expected["ada"]["cached"]
    runtime.close()


def test_this_release_has_a_home_of_its_own(tmp_path: Path) -> None:
    """And what the program makes today is what it made then."""
    assert __version__ in HOMES
    make(tmp_path)
    made = json.loads((tmp_path / "expected.json").read_text())
    assert made == known(__version__)


@pytest.mark.parametrize("release", HOMES)
def test_golden_homes_are_small(release: str) -> None:
    assert sum(p.stat().st_size for p in (FOLDER / release).rglob("*")) < 400_000
