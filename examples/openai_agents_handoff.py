"""OpenAI Agents SDK: a planner hands over to a critic in one session.

Run it twice: the second time both begin with what they know.

pip install "agentmem-mlx[openai-agents]" && agentmem up && python examples/openai_agents_handoff.py
"""

import asyncio

from agents import Agent, ModelSettings, RunConfig, Runner

from agentmem.adapters.openai_agents import AgentMemProvider, AgentMemRunHooks, AgentMemSession

settings = ModelSettings(temperature=0, max_tokens=32)
critic = Agent(
    name="critic",
    instructions="You find what is wrong with the last plan. You answer in one short sentence.",
    model_settings=settings,
)
planner = Agent(
    name="planner",
    instructions="You plan a small garden. You answer in one short sentence.",
    model_settings=settings,
)

hooks = AgentMemRunHooks()  # warms the agent that a handoff goes to
# Who clears it clears what the daemon remembers of it too. AgentMemSession(SQLiteSession("garden", "items.db")) outlives
# the program.
session = AgentMemSession("garden")
config = RunConfig(
    model_provider=AgentMemProvider(),  # finds the running daemon by itself
    tracing_disabled=True,  # the SDK would send traces to OpenAI
)


async def say(agent: Agent, text: str) -> None:
    """One turn of an agent in the session; what it said, and how much of its prompt it remembered."""
    result = await Runner.run(agent, text, session=session, run_config=config, hooks=hooks)
    usage = result.context_wrapper.usage
    cached = usage.input_tokens_details.cached_tokens
    print(f"{agent.name}: {result.final_output.strip()}")
    print(f"  ({cached} of {usage.input_tokens} prompt tokens were remembered)")


async def main() -> None:
    hooks.warm(
        critic
    )  # its memory comes into RAM while the planner speaks, as at a handoff that a model decides on
    await say(planner, "I have two square metres in the shade. What do I plant?")
    await say(critic, "What is wrong with that?")
    await say(planner, "Then what else?")


asyncio.run(main())
