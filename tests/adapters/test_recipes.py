"""Frameworks without an adapter: the parameters that the recipes in `examples/` use, on a real daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient
from smolagents import ChatMessage, CodeAgent, MessageRole, OpenAIModel, PromptTemplates
from smolagents.agents import ActionStep, FinalAnswerPromptTemplate

from agentmem.client import AgentMemClient
from tests.server.conftest import Daemon, Start

pytestmark = pytest.mark.slow

PROMPT = "You plan gardens, and say what is to be planted where. " * 20


def sessions(client: AgentMemClient) -> dict[str, list[str]]:
    return {info["agent"]: info["sessions"] for info in client.agents()}


def share(client: AgentMemClient, agent: str) -> float:
    """How much of the prompt of an agent's last turn was remembered."""
    turn = client.explain(agent)
    return turn["exact_tokens"] / turn["prompt_tokens"]


def autogen_agent(daemon: Daemon, client: AgentMemClient, name: str) -> AssistantAgent:
    options: dict[str, Any] = {"prompt_cache_key": f"{name}/garden", "max_tokens": 12}
    model = OpenAIChatCompletionClient(
        model=client.models()[0]["id"],
        base_url=f"{daemon.url}/v1",
        api_key=daemon.token,
        model_info={
            "vision": False,
            "function_calling": False,
            "json_output": False,
            "structured_output": False,
            "family": "unknown",
        },
        **options,
    )
    return AssistantAgent(name, model, system_message=f"{name}: {PROMPT}")


def test_a_team_of_autogen_remembers(client: AgentMemClient, daemon: Daemon) -> None:
    agents = [autogen_agent(daemon, client, name) for name in ("planner", "critic")]
    asyncio.run(RoundRobinGroupChat(list(agents), max_turns=4).run(task="Shade."))
    assert sessions(client) == {"planner": ["garden"], "critic": ["garden"]}
    for name in ("planner", "critic"):
        assert client.explain(name)["turn"] == 2
        assert share(client, name) > 0.9


def test_autogen_remembers_after_a_restart_of_the_daemon(start: Start, tmp_path: Path) -> None:
    first = start(tmp_path / "home")
    with AgentMemClient(home=first.home) as client:
        agent = autogen_agent(first, client, "planner")

        async def begin() -> dict[str, Any]:
            await agent.run(task="Shade.")
            return dict(await agent.save_state())

        state = asyncio.run(begin())
        assert share(client, "planner") < 0.5
    first.stop()
    second = start(tmp_path / "home")
    with AgentMemClient(home=second.home) as client:
        agent = autogen_agent(second, client, "planner")

        async def go_on() -> None:
            await agent.load_state(state)
            await agent.run(task="A bench.")

        asyncio.run(go_on())
        assert share(client, "planner") > 0.9
        assert sessions(client) == {"planner": ["garden"]}
    second.stop()


def smol_model(daemon: Daemon, name: str) -> OpenAIModel:
    return OpenAIModel(
        "default",
        api_base=f"{daemon.url}/v1",
        api_key=daemon.token,
        prompt_cache_key=f"{name}/garden",
        max_tokens=12,
    )


def remembered(reply: ChatMessage) -> float:
    usage: Any = reply.raw.usage
    return usage.prompt_tokens_details.cached_tokens / usage.prompt_tokens


def test_an_agent_of_smolagents_remembers_from_step_to_step(client: AgentMemClient, daemon: Daemon) -> None:
    final = FinalAnswerPromptTemplate(pre_messages="The task:", post_messages="{{task}} Answer it.")
    templates = PromptTemplates(
        system_prompt=PROMPT * 5,  # a model that writes no code is told so at every step, at some length
        planning={"initial_plan": "", "update_plan_pre_messages": "", "update_plan_post_messages": ""},
        managed_agent={"task": "", "report": ""},
        final_answer=final,
    )
    agent = CodeAgent(
        [], smol_model(daemon, "planner"), prompt_templates=templates, max_steps=3, verbosity_level=0
    )
    agent.run("Shade.")
    steps = [step for step in agent.memory.steps if isinstance(step, ActionStep)]
    replies = [step.model_output_message for step in steps if step.model_output_message is not None]
    shares = [remembered(reply) for reply in replies[:3]]
    assert len(shares) == 3
    assert shares[0] < 0.5
    assert sessions(client) == {"planner": ["garden"]}
    assert min(shares[1:]) > 0.9


def test_models_of_smolagents_are_agents_and_remember_after_a_restart(start: Start, tmp_path: Path) -> None:
    messages = [
        ChatMessage(MessageRole.SYSTEM, [{"type": "text", "text": PROMPT}]),
        ChatMessage(MessageRole.USER, [{"type": "text", "text": "Shade."}]),
    ]
    first = start(tmp_path / "home")
    for name in ("planner", "critic"):
        reply = smol_model(first, name).generate(messages)
    first.stop()
    second = start(tmp_path / "home")
    messages += [reply, ChatMessage(MessageRole.USER, [{"type": "text", "text": "A bench."}])]
    for name in ("planner", "critic"):
        assert remembered(smol_model(second, name).generate(messages)) > 0.9
    with AgentMemClient(home=second.home) as client:
        assert sessions(client) == {"planner": ["garden"], "critic": ["garden"]}
    second.stop()
