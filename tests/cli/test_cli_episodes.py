"""`episodes`, and what `explain` says of a shortened past."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem.client import AgentMemClient
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse
from tests.cli.conftest import served
from tests.engine.turns import words

pytestmark = pytest.mark.slow(minutes=0.2)  # many turns come before what is looked at

EPISODIC = {"kind": "episodic", "budget_tokens": 256, "block_tokens": 256, "episodes": 2}


@pytest.fixture(scope="module")
def elder(tmp_path_factory: pytest.TempPathFactory, models: Path, tiny_model: Path) -> Iterator[Home]:
    """The home of a daemon with agents that talked for long; its encoder needs no weights."""
    root = tmp_path_factory.mktemp("episodes") / "home"
    root.mkdir()
    (root / "config.toml").write_text('episode_encoder = "hash512"\n')
    rng = random.Random(0)
    with served(root, models, "--model", str(tiny_model), "--ram-budget", "64MiB") as home:
        client = AgentMemClient(home=root)
        for name, policy in (("old", EPISODIC), ("moving", {"kind": "window", "recent": 256})):
            client.create(name, policy=policy)
            for _ in range(16):
                client.chat(name, words(rng, 30), max_tokens=6)
        _settled(client)
        yield home


def _settled(client: AgentMemClient) -> None:
    """Wait until the topics and views of what was said are there."""
    before, now = None, client.episodes("old")
    while now != before:
        time.sleep(0.5)
        before, now = now, client.episodes("old")


@pytest.fixture(autouse=True)
def _default_home(elder: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_HOME", str(elder.root))


def test_episodes_are_listed() -> None:
    told = parse(invoke("episodes", "old", "--json"))
    assert told["policy"] == EPISODIC
    lines = invoke("episodes", "old").stdout.splitlines()
    assert lines[0].split() == [
        "EPISODE", "TITLE", "SEGMENTS", "TOKENS", "BYTES", "THROUGH", "STATE", "HITS",
    ]  # fmt: skip
    assert len(lines) == 2 + len(told["episodes"])
    stars = ["*" in line for line in lines[1:-1]]
    assert stars == [episode["active"] for episode in told["episodes"]]
    assert lines[-1].startswith("old, session default: memory episodic, 256 tokens of an episode, 2 episodes")
    assert invoke("episodes", "old", "--session", "default").stdout.splitlines()[0] == lines[0]


def test_a_window_has_no_episodes_and_says_so() -> None:
    last = invoke("episodes", "moving").stdout.splitlines()[-1]
    assert "memory window, the first 4 and the newest 256 tokens" in last
    assert "left out" in last


def test_who_is_not_there() -> None:
    assert invoke("episodes", "nobody").exit_code == 4
    assert invoke("episodes", "old", "--session", "other").exit_code == 4


@pytest.mark.parametrize("agent", ["old", "moving"])
def test_explain_says_what_is_left_out(agent: str) -> None:
    rows = invoke("explain", agent).stdout.splitlines()
    assert any(row.startswith("memory") and "left out" in row for row in rows)
    assert any(row.startswith("prompt") and " compressed, " in row for row in rows)
