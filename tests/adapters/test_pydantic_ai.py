"""pydantic-ai's agents on a real daemon: who they are to it, and what it remembers of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai import Agent, ModelSettings
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import InMemoryConversationStore
from pydantic_ai.models.openai import OpenAIChatModelSettings

from agentmem.adapters.naming import legal_name
from agentmem.adapters.pydantic_ai import AgentMemory, model
from agentmem.client import AgentMemClient, DaemonNotRunning
from tests.server.conftest import Daemon, Start

pytestmark = pytest.mark.slow

PLANNER = "You plan gardens, and say what is to be planted where. " * 20
CRITIC = "You look for what is wrong with the plans of others, and say it kindly. " * 20


def agent(daemon: Daemon, name: str | None, prompt: str = PLANNER, **options: Any) -> Agent[None, str]:
    options.setdefault("capabilities", [AgentMemory(home=daemon.home)])
    spoken = model(home=daemon.home, settings=ModelSettings(max_tokens=12))
    return Agent(spoken, name=name, instructions=prompt, **options)


def reused(result: Any) -> float:
    """The share of the last prompt that was remembered."""
    usage = result.response.usage
    return usage.cache_read_tokens / usage.input_tokens


def sessions(client: AgentMemClient) -> dict[str, list[str]]:
    return {info["agent"]: sorted(info["sessions"]) for info in client.agents()}


def test_two_agents_remember_over_a_restart(start: Start, tmp_path: Path) -> None:
    plans: list[Any] = []
    reviews: list[Any] = []

    def one_round(daemon: Daemon, text: str) -> list[float]:
        """The planner answers, and the critic what it said."""
        planner, critic = agent(daemon, "planner"), agent(daemon, "critic", CRITIC)
        plan = planner.run_sync(text, message_history=plans, conversation_id="t-42")
        review = critic.run_sync(plan.output, message_history=reviews, conversation_id="t-42")
        plans[:], reviews[:] = plan.all_messages(), review.all_messages()
        return [reused(plan), reused(review)]

    first = start(tmp_path / "home")
    assert [share < 0.1 for share in one_round(first, "A bed of roses.")] == [True, True]
    assert [share > 0.9 for share in one_round(first, "And a pond?")] == [True, True]
    with AgentMemClient(home=first.home) as client:
        assert sessions(client) == {"planner": ["t-42"], "critic": ["t-42"]}
    first.stop()

    second = start(tmp_path / "home")
    assert [share > 0.9 for share in one_round(second, "And a hedge?")] == [True, True]
    second.stop()


def test_agents_speak_at_once(daemon: Daemon, client: AgentMemClient) -> None:
    names = [f"worker-{i}" for i in range(4)]
    agents = {name: agent(daemon, name, PLANNER + name) for name in names}

    async def ask(name: str, history: Any) -> Any:
        return await agents[name].run("Go on.", message_history=history, conversation_id=f"t-{name}")

    async def everybody(histories: list[Any]) -> list[Any]:
        return await asyncio.gather(*map(ask, names, histories))

    first = asyncio.run(everybody([None] * len(names)))
    # The second time in a loop of its own, as programs without one do.
    second = asyncio.run(everybody([result.all_messages() for result in first]))
    assert all(reused(result) > 0.9 for result in second)
    assert sessions(client) == {name: [f"t-{name}"] for name in names}


def test_streams_name_their_agent_and_tell_the_usage(daemon: Daemon, client: AgentMemClient) -> None:
    async def streamed() -> float:
        guide = agent(daemon, "guide")
        async with guide.run_stream("Where to?", conversation_id="t-1") as result:
            async for _ in result.stream_text():
                pass
            return reused(result)

    assert asyncio.run(streamed()) == 0
    assert asyncio.run(streamed()) > 0.9
    assert sessions(client) == {"guide": ["t-1"]}


def test_what_is_said_goes_before_what_is_found(daemon: Daemon, client: AgentMemClient) -> None:
    boss = AgentMemory("the boss", home=daemon.home)
    agent(daemon, "planner", capabilities=[boss]).run_sync("Hello", conversation_id="t 1")
    keyed = agent(daemon, "planner")
    settings = OpenAIChatModelSettings(openai_prompt_cache_key="key/s-3")
    keyed.run_sync("Hello", conversation_id="t-1", model_settings=settings)
    assert sessions(client) == {legal_name("the boss"): [legal_name("t 1")], "key": ["s-3"]}


def test_a_conversation_keeps_its_session(daemon: Daemon, client: AgentMemClient) -> None:
    planner = agent(daemon, "planner")
    first = planner.run_sync("Hello")
    planner.run_sync("Go on", message_history=first.all_messages())
    assert sessions(client) == {"planner": [first.conversation_id]}


class State(AbstractCapability[Any]):
    """Writes down in which state the agents are when a model is asked."""

    def __init__(self, client: AgentMemClient) -> None:
        self.client = client
        self.seen: list[str] = []

    async def before_model_request(self, ctx: Any, request_context: Any) -> Any:
        self.seen += [info["state"] for info in self.client.agents()]
        return request_context


def test_an_agent_is_warm_before_it_is_asked(daemon: Daemon, client: AgentMemClient) -> None:
    state = State(client)
    planner = agent(daemon, "planner", capabilities=[AgentMemory(home=daemon.home), state])
    planner.run_sync("Hello", conversation_id="t-1")
    client.evict("planner")
    assert client.agent("planner")["state"] == "warm"
    planner.run_sync("Hello", conversation_id="t-1")
    assert state.seen == ["hot"]


def test_a_daemon_that_is_away_cannot_be_warmed_and_that_is_all(daemon: Daemon, tmp_path: Path) -> None:
    with pytest.raises(DaemonNotRunning):
        model(home=tmp_path)
    away = agent(daemon, "planner", capabilities=[AgentMemory(home=tmp_path)])
    assert away.run_sync("Hello", conversation_id="t-1").output


def test_keys_and_proxies_of_the_environment_stay_there(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert agent(daemon, "planner").run_sync("Hello").output
    assert "sk-of" not in model(url="http://192.0.2.1:1").client.api_key


def test_a_forked_conversation_begins_with_the_memory(daemon: Daemon, client: AgentMemClient) -> None:
    memory = AgentMemory(home=daemon.home)
    planner = agent(daemon, "planner", capabilities=[memory])
    store = InMemoryConversationStore()

    async def say(text: str, conversation: Conversation | None = None) -> Any:
        named: Any = {} if conversation else {"conversation_id": "t-1"}
        result = await planner.run(text, conversation=conversation, **named)
        await store.save(result)
        return result

    async def forked() -> None:
        await say("A bed of roses.")
        fork = await memory.fork(store, "t-1", new_conversation_id="t-2")
        assert [fork.conversation_id, len(fork.messages)] == ["t-2", 2]
        assert client.agent("planner@t-2")["lineage"]["parent"] == "planner"
        # Without the memory of the first conversation, the fork is as quick.
        client.forget("planner")
        assert reused(await say("And a pond?", fork)) > 0.9
        assert sessions(client) == {"planner": ["t-2"], "planner@t-2": ["t-1"]}

        await memory.forget(store, "t-2", scope="of somebody else")
        assert len(sessions(client)) == 2
        await memory.forget(store, "t-2")
        assert sessions(client) == {}
        assert await store.load("t-2") is None
        assert await store.load("t-1") is not None

    asyncio.run(forked())
