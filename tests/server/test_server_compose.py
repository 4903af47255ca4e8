"""Composed reuse over HTTP: what clients see of it, and what they can declare."""

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

SOLVER = "You solve what is asked, step by step, and you say what you are sure of."
JUDGE = "You are strict. You look for what is wrong in what others say, and name it in few words."
TEXTS = [words(random.Random(n), 24) for n in range(7)]
NAMESPACE = "compose"


@pytest.fixture
def client(daemon: Daemon) -> AgentMemClient:
    return AgentMemClient(daemon.url, daemon.token, namespace=NAMESPACE)


def ask(daemon: Daemon, agent: str, system: str, text: str, **fields: Any) -> Any:
    """The response to one prompt of an agent that was made to compose."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    who = {"agent": agent, "namespace": NAMESPACE, "session": f"s{abs(hash(text))}"}
    body = {"messages": messages, "max_tokens": 4, "agentmem": who, **fields}
    response = daemon.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response


def test_a_colleagues_text_is_composed_counted_and_explained(daemon: Daemon, client: AgentMemClient) -> None:
    """The second agent has nothing of the text in its own context, and reads next to nothing of it."""
    for agent in ("solver", "judge"):
        client.create(agent, reuse="composed")
    for text in TEXTS:
        ask(daemon, "solver", SOLVER, text)
    for text in TEXTS[:-1]:
        first = ask(daemon, "judge", JUDGE, text)
    assert first.headers["x-agentmem-composed"] != ""
    before = daemon.metric("agentmem_composed_tokens_total")
    last = ask(daemon, "judge", JUDGE, TEXTS[-1])
    memory = last.json()["usage"]["agentmem"]
    assert memory["composed_tokens"] > 0.8 * len(TEXTS[-1].encode())
    assert last.headers["x-agentmem-composed"] == str(memory["composed_tokens"])
    assert last.headers["x-agentmem-cached-tokens"] == str(memory["exact_tokens"])
    assert daemon.metric("agentmem_composed_tokens_total") == before + memory["composed_tokens"]
    told = client.explain("judge")
    assert "composed from" in told["composition"][0]
    logged = daemon.log.read_text()
    assert f"composed {memory['composed_tokens']} of" in logged
    assert TEXTS[-1][:20] not in logged
    exact = ask(daemon, "plain", JUDGE, TEXTS[-1] + "!")
    assert exact.headers["x-agentmem-composed"] == "0"
    messages = [{"role": "system", "content": JUDGE + " Be brief."}, {"role": "user", "content": TEXTS[-1]}]
    blended = client.chat("third", messages, max_tokens=4, reuse="composed", planner="blend")
    assert blended.composed_tokens > 0.6 * len(TEXTS[-1].encode())
    assert client.explain("third")["planner"] == "blend"
    found = client.verify_composed(NAMESPACE, "blend")
    assert {row["planner"] for row in found["templates"]} == {"blend"}
    found = client.verify_composed(NAMESPACE)
    assert {row["namespace"] for row in found["templates"]} == {NAMESPACE}
    assert any(row["pairs"] for row in found["templates"])


def test_templates_and_documents(daemon: Daemon, client: AgentMemClient) -> None:
    text = "The question is {{question}}. Answer it."
    assert client.declare_template("ask", text) == {"name": "ask", "text": text}
    where = {"namespace": NAMESPACE}
    assert daemon.http.get("/v1/templates/ask", params=where).json()["text"] == text
    assert daemon.http.get("/v1/templates/ask").status_code == 404
    assert client.register_document("spec.md", TEXTS[0])["tokens"] == len(TEXTS[0].encode())
    assert daemon.http.get("/v1/documents", params=where).json()["data"][0]["name"] == "spec.md"
    with pytest.raises(BadRequest, match="slot"):
        client.declare_template("bad", "no slot")
    assert daemon.http.put("/v1/templates/a..b", json={"text": text}).status_code == 400
    assert daemon.bare.put("/v1/templates/ask", json={"text": text}).status_code == 401

    async def gone() -> None:
        async with AsyncAgentMemClient(daemon.url, daemon.token, namespace=NAMESPACE) as other:
            await other.withdraw_template("ask")
            await other.unregister_document("spec.md")
            assert (await other.verify_composed("nowhere"))["templates"] == []

    asyncio.run(gone())
    with pytest.raises(NotFound):
        client.withdraw_template("ask")
    with pytest.raises(NotFound):
        client.unregister_document("spec.md")
