"""The Agents SDK's own runner on a real daemon: who speaks, what is remembered, what is warmed and forgotten."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from agents import (
    Agent,
    ModelSettings,
    RunConfig,
    RunContextWrapper,
    Runner,
    SQLiteSession,
    trace,
)
from agents.memory import Session
from agents.result import RunResultBase

from agentmem.adapters.openai_agents import AgentMemProvider, AgentMemRunHooks, AgentMemSession, digest
from agentmem.client import AgentMemClient, DaemonNotRunning
from tests.server.conftest import Daemon, Start

pytestmark = pytest.mark.slow

PROMPT = "You plan gardens, and say what is to be planted where. " * 20


@pytest.fixture
def run_config(daemon: Daemon) -> RunConfig:
    return RunConfig(model_provider=AgentMemProvider(home=daemon.home), tracing_disabled=True)


def make(name: str, **settings: Any) -> Agent[Any]:
    return Agent(
        name=name, instructions=f"{name}: {PROMPT}", model_settings=ModelSettings(max_tokens=12, **settings)
    )


def say(agent: Agent[Any], text: str, config: RunConfig, session: Session | None = None) -> RunResultBase:
    return asyncio.run(Runner.run(agent, text, run_config=config, session=session))


def share(result: RunResultBase) -> float:
    """How much of the prompt of a run of one turn was remembered."""
    usage = result.context_wrapper.usage
    return usage.input_tokens_details.cached_tokens / usage.input_tokens


def sessions(client: AgentMemClient) -> dict[str, list[str]]:
    return {info["agent"]: info["sessions"] for info in client.agents()}


def until(condition: Any, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def test_two_agents_of_one_session_remember_all_but_what_is_new(
    client: AgentMemClient, run_config: RunConfig
) -> None:
    session, shares = AgentMemSession("garden"), dict[str, list[float]]()
    for text in ("Shade.", "A bench.", "A pond."):
        for name in ("planner", "critic"):
            shares.setdefault(name, []).append(share(say(make(name), text, run_config, session)))
    for first, *later in shares.values():
        assert first < 0.5
        assert min(later) > 0.9
    assert sessions(client) == {"planner": ["garden"], "critic": ["garden"]}


def test_agents_remember_after_a_restart_of_the_daemon(start: Start, tmp_path: Path) -> None:
    agent, session = make("planner"), AgentMemSession(SQLiteSession("garden", tmp_path / "items.db"))
    first = start(tmp_path / "home")
    config = RunConfig(model_provider=AgentMemProvider(home=first.home), tracing_disabled=True)
    say(agent, "Shade.", config, session)
    first.stop()
    second = start(tmp_path / "home")
    config = RunConfig(model_provider=AgentMemProvider(home=second.home), tracing_disabled=True)
    assert share(say(agent, "A bench.", config, session)) > 0.9
    with AgentMemClient(home=second.home) as client:
        assert sessions(client) == {"planner": ["garden"]}
    second.stop()


def test_sessions_have_their_own_names_and_those_of_other_classes_a_digest(
    client: AgentMemClient, run_config: RunConfig
) -> None:
    agent = make("planner")
    ours, twin = AgentMemSession("t-42"), AgentMemSession("default")
    for session in (ours, SQLiteSession("t-43"), twin):
        say(agent, "Shade.", run_config, session)
    say(agent, "Shade.", run_config)
    names = sessions(client)["planner"]
    assert {"t-42", f"session:{digest('t-43')}", "default"} < set(names)
    # No session is not the same as one of that name.
    assert len(names) == 4


def test_a_group_of_runs_is_a_session(client: AgentMemClient, run_config: RunConfig) -> None:
    run_config.group_id = "thread 7"
    run_config.tracing_disabled = False
    with trace("Garden", group_id="thread 7", disabled=True):
        say(make("planner"), "Shade.", run_config)
    say(make("critic"), "Shade.", run_config)
    assert all(len(names) == 1 and "default" not in names for names in sessions(client).values())


def test_a_session_that_is_over_leaves_no_name_behind(client: AgentMemClient, run_config: RunConfig) -> None:
    agent, session = make("planner"), AgentMemSession("t-42")

    async def both() -> None:
        await Runner.run(agent, "Shade.", run_config=run_config, session=session)
        await Runner.run(agent, "Sun.", run_config=run_config)

    asyncio.run(both())
    assert sessions(client) == {"planner": ["default", "t-42"]}


def test_names_that_the_daemon_does_not_take_stay_apart(
    client: AgentMemClient, run_config: RunConfig
) -> None:
    for name in ("Garden planner", "Garden/planner", "Garden-planner"):
        say(make(name), "Shade.", run_config)
    found = sorted(sessions(client))
    assert len(found) == 3
    assert all(name.startswith("Garden-planner") for name in found)


def test_a_key_that_somebody_set_stays(client: AgentMemClient, run_config: RunConfig) -> None:
    say(make("planner", extra_args={"prompt_cache_key": "mine/own"}), "Shade.", run_config)
    say(make("critic", extra_body={"prompt_cache_key": "yours/own"}), "Shade.", run_config)
    assert sessions(client) == {"mine": ["own"], "yours": ["own"]}


@pytest.mark.parametrize("traced", [True, False])
def test_streams_tell_what_was_remembered(
    client: AgentMemClient, run_config: RunConfig, traced: bool
) -> None:
    run_config.tracing_disabled = not traced
    agent, session = make("planner"), AgentMemSession("t-42")

    async def stream(text: str) -> RunResultBase:
        result = Runner.run_streamed(agent, text, run_config=run_config, session=session)
        assert [event async for event in result.stream_events()]
        return result

    assert share(asyncio.run(stream("Shade."))) < 0.5
    assert share(asyncio.run(stream("A bench."))) > 0.9
    assert sessions(client) == {"planner": ["t-42"]}


def test_agents_that_speak_at_once_keep_their_names(client: AgentMemClient, run_config: RunConfig) -> None:
    pairs = [(f"agent{i % 3}", f"session{i}") for i in range(6)]
    held = [AgentMemSession(session) for _, session in pairs]

    async def all_at_once() -> None:
        await asyncio.gather(
            *(
                Runner.run(make(agent), "Shade.", run_config=run_config, session=session)
                for (agent, _), session in zip(pairs, held, strict=True)
            )
        )

    asyncio.run(all_at_once())
    assert {(a, s) for a, names in sessions(client).items() for s in names} == set(pairs)


def test_an_agent_that_is_a_tool_speaks_for_itself(client: AgentMemClient, run_config: RunConfig) -> None:
    """A run within a run, as the SDK's `as_tool` makes one: the outer agent has its name back afterwards."""
    inner, outer = make("critic"), make("planner")
    seen: list[str] = []

    async def instructions(context: RunContextWrapper[Any], agent: Agent[Any]) -> str:
        if not seen:
            seen.append("run")
            await Runner.run(inner, "Shade.", run_config=run_config)
        return PROMPT

    outer.instructions = instructions
    say(outer, "Sun.", run_config, AgentMemSession("t-42"))
    assert sessions(client) == {"planner": ["t-42"], "critic": ["default"]}


def test_a_handoff_warms_the_next_agent(
    client: AgentMemClient, daemon: Daemon, run_config: RunConfig
) -> None:
    """Called as the SDK calls it: a handoff is a tool call, and the model of the tests makes none."""
    planner, critic = make("planner"), make("critic")
    say(critic, "Shade.", run_config)
    assert client.evict("critic")["state"] == "warm"
    hooks = AgentMemRunHooks(home=daemon.home)

    async def hand_over() -> None:
        await asyncio.create_task(
            hooks.on_handoff(context=RunContextWrapper(None), from_agent=planner, to_agent=critic)
        )
        await asyncio.to_thread(until, lambda: client.agent("critic")["state"] == "hot")

    asyncio.run(hand_over())
    assert client.agent("critic")["state"] == "hot"


def test_a_handoff_of_the_models_own(client: AgentMemClient, daemon: Daemon, run_config: RunConfig) -> None:
    critic = make("critic")
    planner = make("planner", tool_choice="transfer_to_critic").clone(handoffs=[critic])
    planner.model_settings.max_tokens = 64
    hooks = AgentMemRunHooks(home=daemon.home)
    result = asyncio.run(
        Runner.run(planner, "Shade.", run_config=run_config, hooks=hooks, session=AgentMemSession("t-42"))
    )
    assert result.last_agent is critic
    assert sessions(client) == {"planner": ["t-42"], "critic": ["t-42"]}


def test_a_handoff_to_an_unknown_agent_and_without_a_daemon_harms_nothing(
    daemon: Daemon, tmp_path: Path
) -> None:
    async def hand_over(home: Path) -> None:
        hooks = AgentMemRunHooks(home=home)
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        await hooks.on_handoff(RunContextWrapper(None), make("planner"), make("nobody"))
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert len(others) == 1
        await asyncio.gather(*others)
        assert failures == []

    asyncio.run(hand_over(daemon.home))
    asyncio.run(hand_over(tmp_path / "nowhere"))


def test_a_cleared_session_is_forgotten_and_only_that(
    client: AgentMemClient, daemon: Daemon, run_config: RunConfig
) -> None:
    first = AgentMemSession("t 42", home=daemon.home)
    second = AgentMemSession("t-43", home=daemon.home)
    say(make("planner"), "Shade.", run_config, first)
    say(make("critic"), "Shade.", run_config, first)
    say(make("critic"), "Sun.", run_config, second)
    say(make("guide"), "Where to?", run_config)
    asyncio.run(first.clear_session())
    assert asyncio.run(first.get_items()) == []
    assert asyncio.run(second.get_items()) != []
    left = sessions(client)
    assert sorted(left) == ["critic", "guide"]
    assert len(left["critic"]) == 1


def test_a_session_named_as_the_default_one_takes_nobody_elses_memory(
    client: AgentMemClient, daemon: Daemon, run_config: RunConfig
) -> None:
    session = AgentMemSession("default", home=daemon.home)
    say(make("guide"), "Where to?", run_config)
    say(make("planner"), "Shade.", run_config, session)
    asyncio.run(session.clear_session())
    assert sorted(sessions(client)) == ["guide"]


def test_clearing_without_a_daemon_says_so(tmp_path: Path) -> None:
    session = AgentMemSession("t-42", home=tmp_path / "nowhere")

    async def clear() -> None:
        await session.add_items([{"role": "user", "content": "Shade."}])
        await session.clear_session()

    with pytest.raises(DaemonNotRunning):
        asyncio.run(clear())
    assert asyncio.run(session.get_items()) == []


def test_a_session_is_one_of_the_sdk(tmp_path: Path) -> None:
    session = AgentMemSession(SQLiteSession("t-42", tmp_path / "items.db"))
    assert isinstance(session, Session)

    async def use() -> None:
        await session.add_items([{"role": "user", "content": text} for text in ("a", "b", "c")])
        assert [item["content"] for item in await session.get_items(2)] == ["b", "c"]  # type: ignore[typeddict-item]
        assert await session.pop_item() == {"role": "user", "content": "c"}

    asyncio.run(use())
