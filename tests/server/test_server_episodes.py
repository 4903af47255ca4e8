"""Agents that keep an episode at hand, over HTTP: what is told of their past, and that others stay as they are."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from agentmem.async_client import AsyncAgentMemClient
from agentmem.client import AgentMemClient
from agentmem.errors import BadRequest, NotFound
from tests.engine.turns import words
from tests.server.conftest import Daemon

pytestmark = pytest.mark.slow(minutes=0.3)  # many turns come before what is looked at

BUDGET, BLOCK = 320, 256
EPISODIC = {"kind": "episodic", "budget_tokens": BUDGET, "block_tokens": BLOCK, "episodes": 2}
OF_A_SESSION = {
    "agent", "session", "policy", "tokens", "resident_tokens", "evicted_tokens", "encoder", "episodes",
}  # fmt: skip
OF_AN_EPISODE = {
    "id", "title", "lines", "segments", "tokens", "bytes", "built_through", "state", "hits", "active",
}  # fmt: skip


@pytest.fixture(scope="module")
def daemon(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """One whose encoder needs no weights."""
    home = tmp_path_factory.mktemp("episodes") / "home"
    home.mkdir()
    (home / "config.toml").write_text('episode_encoder = "hash512"\n')
    return start(home)


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> AgentMemClient:
    return AgentMemClient(daemon.url, daemon.token)


@pytest.fixture(scope="module")
def old(client: AgentMemClient) -> dict[str, Any]:
    """The usage of the last turn of an agent that talked for long."""
    rng = random.Random(0)
    client.create("old", policy=EPISODIC)
    for _ in range(24):
        usage = client.chat("old", words(rng, 30), max_tokens=6).usage
    return usage["agentmem"]


def test_episodes_of_a_long_life(client: AgentMemClient, old: dict[str, Any]) -> None:
    told = client.episodes("old")
    assert told.keys() == OF_A_SESSION
    assert (told["agent"], told["session"], told["encoder"]) == ("old", "default", "hash512")
    assert told["policy"] == EPISODIC
    assert told["tokens"] == client.agent("old")["tokens"] > 3 * BUDGET
    assert 0 <= told["evicted_tokens"] < told["tokens"]
    assert told["episodes"]
    for episode in told["episodes"]:
        assert episode.keys() == OF_AN_EPISODE
        assert episode["tokens"] <= BUDGET
        assert (episode["state"] == "cold") == (episode["built_through"] == 0)
    assert sum(episode["active"] for episode in told["episodes"]) <= 1
    assert client.episodes("old", "default")["tokens"] == told["tokens"]


def test_usage_and_explain_say_what_is_left_out(client: AgentMemClient, old: dict[str, Any]) -> None:
    assert (old["exact_tokens"], old["evicted_tokens"] > BUDGET) == (0, True)
    assert old["compressed_tokens"] > old["evicted_tokens"]
    assert any("left out" in line for line in client.explain("old")["memory"])


def test_hidden_sessions_are_not_shown_and_not_named(client: AgentMemClient, old: dict[str, Any]) -> None:
    assert client.agent("old")["sessions"] == ["default"]
    for name in ("default#topics", "default#view.0"):
        with pytest.raises(BadRequest, match="session"):
            client.episodes("old", name)


def test_who_keeps_all_has_no_episodes(daemon: Daemon, client: AgentMemClient) -> None:
    client.chat("plain", "hello", max_tokens=2)
    told = client.episodes("plain")
    assert (told["policy"], told["episodes"], told["evicted_tokens"]) == ({"kind": "full"}, [], 0)
    assert told["resident_tokens"] <= told["tokens"]
    with pytest.raises(NotFound):
        client.episodes("plain", "other")
    with pytest.raises(NotFound):
        client.episodes("nobody")
    assert daemon.bare.get("/v1/agents/plain/episodes").status_code == 401


def test_the_other_client_sees_the_same(daemon: Daemon, client: AgentMemClient, old: dict[str, Any]) -> None:
    async def seen() -> dict[str, Any]:
        async with AsyncAgentMemClient(daemon.url, daemon.token) as other:
            return await other.episodes("old", session="default")

    there = asyncio.run(seen())
    assert there["tokens"] == client.episodes("old")["tokens"]
