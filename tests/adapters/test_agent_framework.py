"""The Agent Framework's own agents on a real daemon: who speaks, what is remembered, what is warmed and forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from agent_framework import (
    Agent,
    AgentResponse,
    AgentSession,
    ContextProvider,
    SessionContext,
)
from agent_framework.exceptions import ChatClientException

from agentmem.adapters.agent_framework import (
    AgentMemChatMiddleware,
    AgentMemContextProvider,
    chat_client,
    responses_client,
)
from agentmem.client import AgentMemClient
from tests.server.conftest import Daemon, Start

pytestmark = pytest.mark.slow

PROMPT = "You plan gardens, and say what is to be planted where. " * 20


def make(home: Path, name: str | None, **options: Any) -> Agent[Any]:
    options.setdefault("context_providers", [AgentMemContextProvider(home=home)])
    options.setdefault("default_options", {"max_tokens": 12})
    return Agent(chat_client(home=home), f"{name}: {PROMPT}", name=name, **options)


def share(reply: AgentResponse[Any]) -> float:
    """How much of the prompt was remembered."""
    usage = reply.usage_details
    assert usage is not None
    return (usage["cache_read_input_token_count"] or 0) / (usage["input_token_count"] or 0)


def say(agent: Agent[Any], text: str, session: AgentSession | None = None) -> AgentResponse[Any]:
    return asyncio.run(_say(agent, text, session))


async def _say(agent: Agent[Any], text: str, session: AgentSession | None = None) -> AgentResponse[Any]:
    return await agent.run(text, session=session)


def sessions(client: AgentMemClient) -> dict[str, list[str]]:
    return {info["agent"]: info["sessions"] for info in client.agents()}


def test_two_agents_remember_all_but_what_is_new(client: AgentMemClient, daemon: Daemon) -> None:
    for name in ("planner", "critic"):
        agent, session = make(daemon.home, name), AgentSession(session_id="garden")
        shares = [share(say(agent, text, session)) for text in ("Shade.", "A bench.", "A pond.")]
        assert shares[0] < 0.5
        assert min(shares[1:]) > 0.9
    assert sessions(client) == {"planner": ["garden"], "critic": ["garden"]}


def test_agents_remember_after_a_restart_of_the_daemon(start: Start, tmp_path: Path) -> None:
    session = AgentSession(session_id="garden")
    first = start(tmp_path / "home")
    say(make(first.home, "planner"), "Shade.", session)
    first.stop()
    second = start(tmp_path / "home")
    kept = AgentSession.from_dict(session.to_dict())
    assert share(say(make(second.home, "planner"), "A bench.", kept)) > 0.9
    with AgentMemClient(home=second.home) as client:
        assert sessions(client) == {"planner": ["garden"]}
    second.stop()


def test_streams_tell_what_was_remembered(client: AgentMemClient, daemon: Daemon) -> None:
    agent, session = make(daemon.home, "planner"), AgentSession(session_id="garden")

    async def stream(text: str) -> AgentResponse[Any]:
        replies = agent.run(text, session=session, stream=True)
        assert [update async for update in replies]
        return await replies.get_final_response()

    assert share(asyncio.run(stream("Shade."))) < 0.5
    assert share(asyncio.run(stream("A bench."))) > 0.9
    assert sessions(client) == {"planner": ["garden"]}


def test_one_provider_keeps_agents_that_speak_at_once_apart(client: AgentMemClient, daemon: Daemon) -> None:
    provider = AgentMemContextProvider(home=daemon.home)
    pairs = [(f"agent{i % 3}", f"session{i}") for i in range(6)]
    agents = {name: make(daemon.home, name, context_providers=[provider]) for name, _ in pairs}

    async def all_at_once() -> None:
        await asyncio.gather(*(_say(agents[a], "Shade.", AgentSession(session_id=s)) for a, s in pairs))

    asyncio.run(all_at_once())
    assert {(a, s) for a, names in sessions(client).items() for s in names} == set(pairs)


def test_the_middleware_names_without_a_provider(client: AgentMemClient, daemon: Daemon) -> None:
    for name, session in (("critic", AgentSession(session_id="garden")), ("guide", None)):
        middleware = [AgentMemChatMiddleware(name)]
        say(make(daemon.home, name, middleware=middleware, context_providers=[]), "Shade.", session)
    assert sessions(client) == {"critic": ["garden"], "guide": ["default"]}


def test_names_that_the_daemon_does_not_take_stay_apart(client: AgentMemClient, daemon: Daemon) -> None:
    for name in ("Garden planner", "Garden/planner"):
        say(make(daemon.home, name), "Shade.", AgentSession(session_id="t 42/a"))
    found = sessions(client)
    assert len(found) == 2
    assert all(name.startswith("Garden-planner-") for name in found)
    assert len({s for names in found.values() for s in names}) == 1


def test_an_agent_without_a_name_is_one_for_each_session(client: AgentMemClient, daemon: Daemon) -> None:
    for session in ("garden", "garden", "park"):
        say(make(daemon.home, None), "Shade.", AgentSession(session_id=session))
    assert sessions(client) == {"garden": ["default"], "park": ["default"]}


def test_a_key_that_somebody_set_stays(client: AgentMemClient, daemon: Daemon) -> None:
    options = {"max_tokens": 12, "prompt_cache_key": "mine/own"}
    agent = make(daemon.home, "planner", default_options=options)
    say(agent, "Shade.", AgentSession(session_id="garden"))
    assert sessions(client) == {"mine": ["own"]}


class SlowProvider(ContextProvider):
    """Waits for an agent to be hot, as another provider that looks something up: runs begin when all are done."""

    def __init__(self, client: AgentMemClient) -> None:
        super().__init__("slow")
        self.client = client
        self.state = ""

    async def before_run(self, *, agent: Any, session: Any, context: SessionContext, state: Any) -> None:
        end = time.monotonic() + 20
        while (found := self.client.agent(agent.name)["state"]) != "hot" and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.state = found


def test_a_run_warms_while_it_is_made_ready(client: AgentMemClient, daemon: Daemon) -> None:
    session = AgentSession(session_id="garden")
    say(make(daemon.home, "planner"), "Shade.", session)
    assert client.evict("planner")["state"] == "warm"
    slow = SlowProvider(client)
    providers = [AgentMemContextProvider(home=daemon.home), slow]
    reply = say(make(daemon.home, "planner", context_providers=providers), "A bench.", session)
    assert slow.state == "hot"
    assert share(reply) > 0.9


def test_a_forgotten_session_takes_its_agents_along(client: AgentMemClient, daemon: Daemon) -> None:
    provider = AgentMemContextProvider(home=daemon.home)
    garden, park = AgentSession(session_id="garden"), AgentSession(session_id="park")
    for name, session in (("planner", garden), ("critic", garden), ("critic", park)):
        say(make(daemon.home, name, context_providers=[provider]), "Shade.", session)
    assert asyncio.run(provider.forget(garden)) == ["planner"]
    assert list(sessions(client)) == ["critic"]


def test_the_responses_client_is_named_too(client: AgentMemClient, daemon: Daemon) -> None:
    agent = Agent(
        responses_client(home=daemon.home),
        f"planner: {PROMPT}",
        name="planner",
        context_providers=[AgentMemContextProvider(home=daemon.home)],
        default_options={"max_tokens": 12},
    )
    session = AgentSession(session_id="garden")
    assert share(say(agent, "Shade.", session)) < 0.5
    assert share(say(agent, "A bench.", session)) > 0.9
    assert sessions(client) == {"planner": ["garden"]}


def test_a_responses_call_carries_the_key(daemon: Daemon) -> None:
    """Whether or not the daemon serves it."""
    client, sent = responses_client(home=daemon.home), list[dict[str, Any]]()

    async def note(request: httpx.Request) -> None:
        sent.append(json.loads(request.content))

    client.client._client.event_hooks["request"].append(note)
    agent = Agent(
        client,
        name="planner",
        context_providers=[AgentMemContextProvider(home=daemon.home)],
        default_options={"max_tokens": 12},
    )
    with contextlib.suppress(ChatClientException):
        say(agent, "Shade.", AgentSession(session_id="garden"))
    assert sent[0]["prompt_cache_key"] == "planner/garden"
