"""LangChain's agents on a real daemon: who they are to it, and what it remembers of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.messages.utils import count_tokens_approximately
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from pydantic import SecretStr

from agentmem.adapters.langchain import AgentMemMiddleware, ChatAgentMem
from agentmem.adapters.naming import legal_name
from agentmem.client import AgentMemClient, DaemonNotRunning
from tests.server.conftest import Daemon, Start

pytestmark = pytest.mark.slow

PLANNER = "You plan gardens, and say what is to be planted where. " * 20
CRITIC = "You look for what is wrong with the plans of others, and say it kindly. " * 20


def chat_model(daemon: Daemon, **options: Any) -> ChatAgentMem:
    return ChatAgentMem(home=daemon.home, max_completion_tokens=12, **options)


def pair(model: ChatAgentMem, saver: BaseCheckpointSaver[Any]) -> Any:
    """A planner, and a critic who hears it."""
    graph = StateGraph(MessagesState)
    for name, prompt in (("planner", PLANNER), ("critic", CRITIC)):
        graph.add_node(name, create_agent(model, tools=[], name=name, system_prompt=prompt))
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "critic")
    graph.add_edge("critic", END)
    return graph.compile(checkpointer=saver)


def thread(name: str) -> dict[str, Any]:
    return {"configurable": {"thread_id": name}}


def say(graph: Any, text: str, where: str) -> list[AIMessage]:
    """The replies of one round."""
    messages = graph.invoke({"messages": [HumanMessage(text)]}, thread(where))["messages"]
    last = max(i for i, message in enumerate(messages) if isinstance(message, HumanMessage))
    return [message for message in messages[last:] if isinstance(message, AIMessage)]


def memory(reply: AIMessage) -> dict[str, Any]:
    return reply.response_metadata["token_usage"]["agentmem"]


def reused(reply: AIMessage) -> float:
    """The share of the prompt that was remembered; both ways of telling it agree."""
    usage = reply.usage_metadata
    assert usage is not None
    assert usage["input_token_details"]["cache_read"] == memory(reply)["exact_tokens"]
    return memory(reply)["exact_tokens"] / usage["input_tokens"]


def test_two_agents_remember_over_a_restart(start: Start, tmp_path: Path) -> None:
    saver = InMemorySaver()
    first = start(tmp_path / "home")
    graph = pair(chat_model(first), saver)
    say(graph, "A bed of roses.", "t-42")
    replies = say(graph, "And a pond?", "t-42")
    assert [reused(reply) > 0.9 for reply in replies] == [True, True]
    with AgentMemClient(home=first.home) as client:
        assert {a["agent"]: a["sessions"] for a in client.agents()} == {
            "planner": ["t-42"],
            "critic": ["t-42"],
        }
    first.stop()

    second = start(tmp_path / "home")
    replies = say(pair(chat_model(second), saver), "And a hedge?", "t-42")
    assert [memory(reply)["state_before"] for reply in replies] == ["warm", "warm"]
    assert [reused(reply) > 0.9 for reply in replies] == [True, True]
    second.stop()


def test_agents_speak_at_once(daemon: Daemon, client: AgentMemClient) -> None:
    model = chat_model(daemon)
    names = [f"worker-{i}" for i in range(4)]
    agents: dict[str, Any] = {
        name: create_agent(model, tools=[], name=name, system_prompt=PLANNER + name) for name in names
    }

    async def ask(name: str, *texts: str) -> AIMessage:
        messages = [HumanMessage(text) for text in texts]
        return (await agents[name].ainvoke({"messages": messages}, thread(f"t-{name}")))["messages"][-1]

    async def everybody(*texts: str) -> list[AIMessage]:
        return await asyncio.gather(*(ask(name, *texts) for name in names))

    asyncio.run(everybody("Begin."))
    # The second time in a loop of its own, as programs without one do.
    replies = asyncio.run(everybody("Begin.", "Go on."))
    assert [memory(reply)["agent"] for reply in replies] == names
    assert all(reused(reply) > 0.9 for reply in replies)
    assert {a["agent"]: a["sessions"] for a in client.agents()} == {name: [f"t-{name}"] for name in names}


def test_streams_name_their_agent_and_tell_the_usage(daemon: Daemon, client: AgentMemClient) -> None:
    agent: Any = create_agent(chat_model(daemon), tools=[], name="guide", system_prompt=PLANNER)
    question: Any = {"messages": [HumanMessage("Where to?")]}

    def streamed(pieces: list[Any]) -> int:
        usage = [p.usage_metadata for p in pieces if isinstance(p, AIMessageChunk) and p.usage_metadata]
        assert len(usage) == 1
        return usage[0]["input_token_details"]["cache_read"]

    def sync() -> list[Any]:
        return [piece for piece, _ in agent.stream(question, thread("t-1"), stream_mode="messages")]

    async def later() -> list[Any]:
        return [piece async for piece, _ in agent.astream(question, thread("t-1"), stream_mode="messages")]

    assert streamed(sync()) == 0
    assert streamed(asyncio.run(later())) > 1000
    assert {a["agent"]: (a["sessions"], a["turns"]) for a in client.agents()} == {"guide": (["t-1"], 2)}


def test_what_is_said_goes_before_what_is_found(daemon: Daemon) -> None:
    run: Any = {"metadata": {"lc_agent_name": "planner", "thread_id": "t-1"}}

    def spoken(model: Any, **options: Any) -> tuple[str, str]:
        found = memory(model.invoke("Hello", config=run, **options))
        return found["agent"], found["session"]

    model = chat_model(daemon)
    named = chat_model(daemon, agent="boss", session="s 1")
    assert spoken(model) == ("planner", "t-1")
    assert spoken(named) == ("boss", legal_name("s 1"))
    assert spoken(named, agent="guest") == ("guest", legal_name("s 1"))
    assert spoken(model.bind(agent="guest", session="s-2")) == ("guest", "s-2")
    assert spoken(named, prompt_cache_key="key/s-3") == ("key", "s-3")
    assert spoken(chat_model(daemon, model_kwargs={"prompt_cache_key": "key/s-4"})) == ("key", "s-4")
    assert memory(model.invoke("Hello"))["agent"].startswith("anonymous-")


def test_a_node_names_the_agent_where_nothing_else_does(daemon: Daemon) -> None:
    model = chat_model(daemon)
    graph = StateGraph(MessagesState)
    graph.add_node("write a poem", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "write a poem")
    (reply,) = say(graph.compile(), "Spring.", "t 7")
    assert memory(reply)["agent"] == legal_name("write a poem")
    assert memory(reply)["session"] == legal_name("t 7")


def test_counting_tokens_asks_nobody_for_a_tokenizer(daemon: Daemon) -> None:
    model, message = chat_model(daemon), HumanMessage("A bed of roses. " * 20)
    estimate = count_tokens_approximately([message])
    assert model.get_num_tokens_from_messages([message]) == estimate
    assert model.get_num_tokens(message.text) == estimate


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prompt_that_is_too_long_is_told_in_langchains_words(daemon: Daemon, streaming: bool) -> None:
    model = chat_model(daemon, streaming=streaming)
    with pytest.raises(ContextOverflowError, match="tokens"):
        model.invoke("x" * 9000)
    with pytest.raises(ContextOverflowError, match="tokens"):
        asyncio.run(model.ainvoke("x" * 9000))


def test_without_a_daemon_there_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(DaemonNotRunning):
        ChatAgentMem(home=tmp_path)


def test_keys_and_proxies_of_the_environment_stay_there(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "OPENAI_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    model = chat_model(daemon)
    assert model.invoke("Hello").content
    assert asyncio.run(model.ainvoke("Hello")).content
    elsewhere = ChatAgentMem(url="http://192.0.2.1:1")
    assert "sk-of" not in elsewhere.root_client.api_key


Speak = Callable[[Any, Any], AIMessage]


def invoke(agent: Any, config: Any) -> AIMessage:
    return agent.invoke({"messages": [HumanMessage("Hello")]}, config)["messages"][-1]


def ainvoke(agent: Any, config: Any) -> AIMessage:
    return asyncio.run(agent.ainvoke({"messages": [HumanMessage("Hello")]}, config))["messages"][-1]


class State(AgentMiddleware):
    """Writes down in which state the agent is when its model is asked."""

    def __init__(self, client: AgentMemClient) -> None:
        super().__init__()
        self.client = client
        self.seen: list[str] = []

    def before_model(self, state: Any, runtime: Any) -> None:
        self.seen += [info["state"] for info in self.client.agents() if info["turns"]]


@pytest.mark.parametrize("speak", [invoke, ainvoke])
def test_middleware_names_and_warms_any_models_agent(
    daemon: Daemon, client: AgentMemClient, speak: Speak
) -> None:
    model = ChatOpenAI(
        base_url=f"{daemon.url}/v1",
        api_key=SecretStr(daemon.token),
        model="default",
        max_completion_tokens=4,
        # Two loops, one model: connections of the first would be of no use.
        http_async_client=httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0)),
    )
    seen = State(client)
    agent = create_agent(
        model,
        tools=[],
        name="plan ner",
        system_prompt=PLANNER,
        middleware=[AgentMemMiddleware(home=daemon.home), seen],
    )
    name = legal_name("plan ner")
    assert memory(speak(agent, thread("t-1")))["agent"] == name
    client.evict(name)
    reply = speak(agent, thread("t-1"))
    assert (memory(reply)["agent"], memory(reply)["session"]) == (name, "t-1")
    assert seen.seen == ["hot"]


@pytest.mark.parametrize("speak", [invoke, ainvoke])
def test_middleware_lets_an_explicit_name_be(daemon: Daemon, speak: Speak) -> None:
    middleware = AgentMemMiddleware("other", home=daemon.home)
    ours = create_agent(chat_model(daemon, agent="boss"), tools=[], name="planner", middleware=[middleware])
    assert memory(speak(ours, thread("t-1")))["agent"] == "boss"
    plain = create_agent(chat_model(daemon), tools=[], name="planner", middleware=[middleware])
    assert memory(speak(plain, thread("t-1")))["agent"] == "other"
    nameless = create_agent(chat_model(daemon), tools=[], middleware=[AgentMemMiddleware(home=daemon.home)])
    assert memory(speak(nameless, thread("t-1")))["agent"] == "model"


@pytest.mark.parametrize("speak", [invoke, ainvoke])
def test_a_daemon_that_is_away_cannot_be_warmed_and_that_is_all(
    daemon: Daemon, tmp_path: Path, speak: Speak
) -> None:
    agent = create_agent(
        chat_model(daemon), tools=[], name="planner", middleware=[AgentMemMiddleware(home=tmp_path)]
    )
    assert memory(speak(agent, thread("t-1")))["agent"] == "planner"
