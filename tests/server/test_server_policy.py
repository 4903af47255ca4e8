"""Forks, pins, quotas, ephemeral agents and prune, over HTTP and by the clients."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agentmem.async_client import AsyncAgentMemClient
from agentmem.client import AgentMemClient
from agentmem.errors import AlreadyExists, BadRequest, NotFound
from tests.server.conftest import Daemon


@pytest.fixture
def client(daemon: Daemon) -> AgentMemClient:
    return AgentMemClient(daemon.url, daemon.token)


def test_a_fork_over_http(daemon: Daemon, client: AgentMemClient) -> None:
    first = client.chat("f-parent", "The bell is green. " * 20, max_tokens=3)
    client.chat("f-parent", "And now?", max_tokens=3)
    info = client.fork("f-parent", "f-child", at=1)
    assert info["lineage"] == {"parent": "f-parent", "session": "default", "turn": 1}
    assert info["shared_bytes"] > 0
    reply = client.chat("f-child", "What colour?", max_tokens=3)
    assert reply.cached_tokens >= first.usage["prompt_tokens"] - 1
    assert client.agent("f-child")["turns"] == 1
    with pytest.raises(AlreadyExists):
        client.fork("f-parent", "f-child")
    with pytest.raises(NotFound):
        client.fork("f-nobody", "f-other")
    with pytest.raises(BadRequest, match="turns 1 to 2"):
        client.fork("f-parent", "f-other", at=9)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/agents/p-ada/fork", {}, "agent"),
        ("/v1/agents/p-ada/fork", {"agent": "../x"}, "agent"),
        ("/v1/agents/p-ada/fork", {"agent": "x", "at": 0}, "at"),
        ("/v1/agents/p-ada/fork", {"agent": "x", "at": "1"}, "at"),
        ("/v1/agents", {"agent": "a/b"}, "agent"),
        ("/v1/agents", {"agent": "p-x", "quota_bytes": 0}, "quota_bytes"),
        ("/v1/agents", {"agent": "p-x", "pinned": "yes"}, "pinned"),
        ("/v1/agents", {"agent": "p-x", "reuse": "always"}, "reuse"),
        ("/v1/agents", {"agent": "p-x", "planner": "dense"}, "planner"),
        ("/v1/agents", {"agent": "p-x", "planner": "paper"}, "planner"),
        ("/v1/agents", {"agent": "p-x", "planner": 1}, "planner"),
        ("/v1/compose/verify", {"planner": "dense"}, "planner"),
        ("/v1/agents", {"agent": "p-x", "policy": "episodic"}, "policy"),
        ("/v1/agents", {"agent": "p-x", "policy": {}}, "policy"),
        ("/v1/agents", {"agent": "p-x", "policy": {"kind": "small"}}, "policy"),
        ("/v1/agents", {"agent": "p-x", "policy": {"kind": ["full"]}}, "policy"),
        ("/v1/agents", {"agent": "p-x", "policy": {"kind": "episodic"}}, "policy.budget_tokens"),
        ("/v1/agents", {"agent": "p-x", "policy": {"kind": "window", "recent": 255}}, "policy.recent"),
        ("/v1/agents", {"agent": "p-x", "policy": {"kind": "full", "recent": 512}}, "policy.recent"),
        ("/v1/store/prune", {}, "older_s"),
        ("/v1/store/prune", {"older_s": -1}, "older_s"),
        ("/v1/store/prune", {"older_s": 1, "namespace": "a/b"}, "namespace"),
    ],
)
def test_bad_bodies_change_nothing(daemon: Daemon, path: str, body: dict[str, object], param: str) -> None:
    daemon.chat("p-ada", "hello")
    before = daemon.http.get("/v1/agents").json()
    response = daemon.http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert daemon.http.get("/v1/agents").json() == before


def test_policies_are_made_changed_and_kept(daemon: Daemon, client: AgentMemClient) -> None:
    info = client.create("q-ada", pinned=True, quota_bytes=1 << 20)
    assert (info["pinned"], info["quota_bytes"], info["state"], info["turns"]) == (True, 1 << 20, "cold", 0)
    with pytest.raises(AlreadyExists):
        client.create("q-ada")
    client.chat("q-ada", "hello", max_tokens=2)
    assert client.set_policy("q-ada", quota_bytes=None)["quota_bytes"] is None
    assert daemon.http.post("/v1/agents/q-ada/unpin", json={}).json()["pinned"] is False
    assert daemon.http.post("/v1/agents/q-ada/pin", json={}).json()["pinned"] is True
    assert daemon.http.patch("/v1/agents/q-none", json={"pinned": True}).status_code == 404


def test_what_may_be_reused_is_asked_of_an_agent_or_of_a_request(
    daemon: Daemon, client: AgentMemClient
) -> None:
    assert client.create("reuse-ada", reuse="composed")["reuse"] == "composed"
    client.chat("reuse-ada", "A gate is blue. " * 24, max_tokens=2)
    told = client.explain("reuse-ada")
    assert (told["reuse"], told["composed_tokens"]) == ("composed", 0)
    assert told["composition"][0].startswith("not composed: ")
    assert client.set_policy("reuse-ada", reuse="exact")["reuse"] == "exact"
    assert client.chat("reuse-ada", "And now?", max_tokens=2).cached_tokens > 300
    assert "composition" not in client.explain("reuse-ada")
    off = client.chat("reuse-ada", "And then?", max_tokens=2, reuse="off")
    assert (off.cached_tokens, off.composed_tokens) == (0, 0)
    assert client.explain("reuse-ada")["reason"] == "off"
    for wrong in ({"reuse": "some"}, {"planner": "paper"}):
        body = {"messages": [{"role": "user", "content": "x"}], "agentmem": {"agent": "x", **wrong}}
        assert daemon.http.post("/v1/chat/completions", json=body).status_code == 400
    assert client.chat("reuse-ada", "And so?", max_tokens=2, reuse="composed", planner="lego").text


def test_how_prompts_are_composed_is_asked_of_an_agent(daemon: Daemon, client: AgentMemClient) -> None:
    assert client.create("how-ada")["planner"] == "kvcomm+tail"
    assert client.create("how-bob", reuse="auto", planner="lego")["planner"] == "lego"
    assert client.set_policy("how-bob", planner="kvcomm")["planner"] == "kvcomm"
    assert client.set_policy("how-bob", reuse="composed")["planner"] == "kvcomm", "only what is named changes"
    refused = daemon.http.patch("/v1/agents/how-bob", json={"planner": "dense"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "planner")
    assert client.agent("how-bob")["planner"] == "kvcomm"

    async def change() -> dict[str, object]:
        async with AsyncAgentMemClient(daemon.url, daemon.token) as other:
            return await other.set_policy("how-bob", planner="lego")

    assert asyncio.run(change())["planner"] == "lego"


EPISODIC = {"kind": "episodic", "budget_tokens": 8192}
WINDOW = {"kind": "window", "recent": 4096, "sinks": 8}


def test_how_much_of_its_past_an_agent_keeps(daemon: Daemon, client: AgentMemClient) -> None:
    """Defaults are filled in; what is not named stays; `full` and null are the way back."""
    filled = {**EPISODIC, "episodes": None, "block_tokens": 1024}
    assert client.create("m-ada", policy=EPISODIC, pinned=True)["policy"] == filled
    assert client.set_policy("m-ada", pinned=False)["policy"] == filled
    assert client.set_policy("m-ada", policy=WINDOW)["policy"] == WINDOW
    listed = {agent["agent"]: agent["policy"] for agent in client.agents()}
    assert listed["m-ada"] == client.agent("m-ada")["policy"] == WINDOW
    assert client.set_policy("m-ada", policy={"kind": "full"})["policy"] == {"kind": "full"}
    client.set_policy("m-ada", policy=EPISODIC)
    assert client.set_policy("m-ada", policy=None)["policy"] == {"kind": "full"}
    assert client.create("m-bob")["policy"] == {"kind": "full"}
    refused: tuple[object, ...] = ({"kind": "window"}, {"kind": "episodic", "budget_tokens": "8192"}, [])
    for wrong in refused:
        assert daemon.http.patch("/v1/agents/m-ada", json={"policy": wrong}).status_code == 400
    assert client.agent("m-ada")["policy"] == {"kind": "full"}
    with pytest.raises(NotFound):
        client.set_policy("m-nobody", policy=WINDOW)


def test_a_fork_and_an_import_keep_what_was_asked(client: AgentMemClient, tmp_path: Path) -> None:
    """An import need not be trusted: how much it keeps is of no weight to other agents."""
    client.create("t-ada", policy=WINDOW)
    client.chat("t-ada", "hello", max_tokens=2)
    assert client.fork("t-ada", "t-fork")["policy"] == WINDOW
    client.export("t-ada", tmp_path / "ada")
    assert client.import_agent(tmp_path / "ada", "t-eve")["agent"]["policy"] == WINDOW
    client.chat("t-bob", "hello", max_tokens=2)
    client.export("t-bob", tmp_path / "plain")
    assert client.import_agent(tmp_path / "plain", "t-plain")["agent"]["policy"] == {"kind": "full"}


def test_an_ephemeral_agent_says_that_it_is_not_committed(client: AgentMemClient) -> None:
    reply = client.chat("e-ghost", "hello there", max_tokens=2, persist=False)
    assert reply.memory["committed"] is False
    assert client.agent("e-ghost")["persist"] is False
    assert client.chat("e-ghost", "and now", max_tokens=2).cached_tokens > 0
    with pytest.raises(BadRequest, match="persist"):
        client.chat("e-ghost", "more", max_tokens=2, persist=True)


def test_prune_and_store_by_both_clients(daemon: Daemon, client: AgentMemClient) -> None:
    client.chat("r-ada", "The tide is low. " * 20, max_tokens=2)
    seen = client.prune(0.0, dry_run=True)
    assert "r-ada" in seen["agents"]
    assert seen["bytes_freed"] == 0
    store = client.store()
    assert 0 < store["unique_bytes"] <= store["without_sharing_bytes"]
    assert store["namespaces"]["default"]["agents"] == len(client.agents())

    async def same() -> None:
        async with AsyncAgentMemClient(daemon.url, daemon.token) as other:
            assert (await other.prune(0.0, dry_run=True))["agents"] == seen["agents"]
            assert (await other.fork("r-ada", "r-bob"))["agent"] == "r-bob"
            assert (await other.create("r-eve"))["turns"] == 0
            assert (await other.set_policy("r-eve", pinned=True))["pinned"] is True
            assert (await other.set_policy("r-eve", policy=WINDOW))["policy"] == WINDOW
            await other.forget("r-eve")

    asyncio.run(same())
