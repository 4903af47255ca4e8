"""Threads that are copied and deleted, and the memory of their agents with them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver

from agentmem.adapters.langchain import AgentMemSaver, ChatAgentMem
from agentmem.client import AgentMemClient, DaemonNotRunning
from tests.server.conftest import Daemon

pytestmark = pytest.mark.slow

PROMPT = "You plan gardens, and say what is to be planted where. " * 20

Change = Callable[..., None]


def copy(saver: AgentMemSaver, source: str, target: str) -> None:
    saver.copy_thread(source, target)


def acopy(saver: AgentMemSaver, source: str, target: str) -> None:
    asyncio.run(saver.acopy_thread(source, target))


def delete(saver: AgentMemSaver, thread: str) -> None:
    saver.delete_thread(thread)


def adelete(saver: AgentMemSaver, thread: str) -> None:
    asyncio.run(saver.adelete_thread(thread))


@pytest.fixture
def saver(daemon: Daemon) -> AgentMemSaver:
    return AgentMemSaver(InMemorySaver(), home=daemon.home)


class Garden:
    """Agents with one saver, that speak in threads."""

    def __init__(self, daemon: Daemon, saver: BaseCheckpointSaver[Any]) -> None:
        self._model = ChatAgentMem(home=daemon.home, max_completion_tokens=12)
        self._saver = saver

    def agent(self, name: str) -> Any:
        return create_agent(
            self._model, tools=[], name=name, system_prompt=f"{name}: {PROMPT}", checkpointer=self._saver
        )

    def say(self, name: str, text: str, thread: str) -> float:
        """The share of the prompt that was remembered."""
        config = {"configurable": {"thread_id": thread}}
        reply = self.agent(name).invoke({"messages": [HumanMessage(text)]}, config)["messages"][-1]
        return (
            reply.usage_metadata["input_token_details"]["cache_read"] / reply.usage_metadata["input_tokens"]
        )

    def texts(self, name: str, thread: str) -> list[str]:
        state = self.agent(name).get_state({"configurable": {"thread_id": thread}})
        return [message.text for message in state.values.get("messages", [])]


@pytest.fixture
def garden(daemon: Daemon, saver: AgentMemSaver) -> Garden:
    return Garden(daemon, saver)


def sessions(client: AgentMemClient) -> dict[str, list[str]]:
    return {info["agent"]: sorted(info["sessions"]) for info in client.agents()}


def test_every_method_of_savers_goes_to_the_saver() -> None:
    methods = {name for name, _ in inspect.getmembers(BaseCheckpointSaver, inspect.isfunction)}
    wanted = {name for name in methods if not name.startswith("__")} | {"config_specs"}
    assert wanted - vars(AgentMemSaver).keys() == set()


def test_what_a_saver_has_of_its_own_is_there(saver: AgentMemSaver) -> None:
    inner: Any = saver.saver
    assert saver.storage is inner.storage
    with pytest.raises(AttributeError):
        _ = saver.nothing_like_it


@pytest.mark.parametrize("change", [copy, acopy])
def test_a_copied_thread_begins_with_the_memory(
    garden: Garden, saver: AgentMemSaver, client: AgentMemClient, change: Change
) -> None:
    for text in ("A bed of roses.", "And a pond?"):
        garden.say("planner", text, "t-1")
    change(saver, "t-1", "t-2")
    assert garden.texts("planner", "t-2") == garden.texts("planner", "t-1") != []
    lineage = client.agent("planner@t-2")["lineage"]
    assert (lineage["parent"], lineage["session"], lineage["turn"]) == ("planner", "t-1", 2)

    # Without the memory of the first thread, the copy is as quick.
    client.forget("planner")
    assert garden.say("planner", "And a hedge?", "t-2") > 0.9
    assert sessions(client) == {"planner": ["t-2"], "planner@t-2": ["t-1"]}
    assert garden.texts("planner", "t-1") == garden.texts("planner", "t-2")[:4]
    assert len(garden.texts("planner", "t-2")) == 6


def test_copies_of_copies(garden: Garden, saver: AgentMemSaver, client: AgentMemClient) -> None:
    garden.say("planner", "A bed of roses.", "t-1")
    saver.copy_thread("t-1", "t-2")
    saver.copy_thread("t-2", "t-3")
    assert client.agent("planner@t-2@t-3")["lineage"]["parent"] == "planner@t-2"
    garden.say("planner", "And a pond?", "t-2")
    saver.copy_thread("t-2", "t-4")
    assert client.agent("planner@t-4")["lineage"]["session"] == "t-2"
    assert garden.say("planner", "And a hedge?", "t-4") > 0.9


@pytest.mark.parametrize("change", [delete, adelete])
def test_a_deleted_thread_is_forgotten(
    garden: Garden, saver: AgentMemSaver, client: AgentMemClient, change: Change
) -> None:
    garden.say("planner", "A bed of roses.", "t-1")
    garden.say("critic", "A bed of roses.", "t-1")
    garden.say("critic", "A bed of tulips.", "t-2")
    saver.copy_thread("t-1", "t-3")
    client.fork("planner", "mine")
    change(saver, "t-1")
    # Who speaks elsewhere too keeps that, and what was forked from the thread stays.
    assert sessions(client) == {
        "critic": ["t-2"],
        "planner@t-3": ["t-1"],
        "critic@t-3": ["t-1"],
        "mine": ["t-1"],
    }
    assert garden.texts("planner", "t-1") == []
    assert garden.texts("planner", "t-3") != []
    change(saver, "t-3")
    assert sessions(client) == {"critic": ["t-2"], "mine": ["t-1"]}
    assert garden.texts("planner", "t-3") == []


def test_a_thread_named_default_is_nobody_elses(
    garden: Garden, saver: AgentMemSaver, client: AgentMemClient
) -> None:
    client.chat("by-hand", "Hello", max_tokens=2)
    garden.say("planner", "A bed of roses.", "default")
    saver.delete_thread("default")
    assert sessions(client) == {"by-hand": ["default"]}


@pytest.mark.parametrize(("change", "remove"), [(copy, delete), (acopy, adelete)])
def test_a_daemon_that_is_away_may_not_keep_what_is_to_be_deleted(
    garden: Garden, saver: AgentMemSaver, tmp_path: Path, change: Change, remove: Change
) -> None:
    garden.say("planner", "A bed of roses.", "t-1")
    away = AgentMemSaver(saver.saver, home=tmp_path)
    change(away, "t-1", "t-2")
    assert garden.texts("planner", "t-2") == garden.texts("planner", "t-1")
    with pytest.raises(DaemonNotRunning):
        remove(away, "t-1")
    assert garden.texts("planner", "t-1") != []
