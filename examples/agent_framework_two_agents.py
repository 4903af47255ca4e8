"""Microsoft Agent Framework: a planner and a critic, each with a memory of its own.

Run it twice: the second time they begin with it.

pip install "agentmem-mlx[agent-framework]" && agentmem up && python examples/agent_framework_two_agents.py
"""

import asyncio

from agent_framework import Agent, AgentSession, ChatOptions

from agentmem.adapters.agent_framework import AgentMemContextProvider, chat_client

client = chat_client()  # finds the running daemon by itself
memory = AgentMemContextProvider()  # names each agent and its session to the daemon, and warms it
options = ChatOptions(temperature=0, max_tokens=32)
planner, critic = (
    Agent(client, instructions, name=name, context_providers=[memory], default_options=options)
    for name, instructions in {
        "planner": "You plan a small garden. You answer in one short sentence.",
        "critic": "You find what is wrong with the last plan. You answer in one short sentence.",
    }.items()
)


async def say(agent: Agent, text: str, session: AgentSession) -> str:
    """One turn; what the agent said, and how much of its prompt it remembered."""
    reply = await agent.run(text, session=session)
    usage = reply.usage_details or {}
    cached, prompt = usage.get("cache_read_input_token_count"), usage.get("input_token_count")
    print(f"{agent.name}: {reply.text.strip()}")
    print(f"  ({cached} of {prompt} prompt tokens were remembered)")
    return reply.text


async def main() -> None:
    plans, doubts = AgentSession(session_id="garden"), AgentSession(session_id="garden")
    plan = await say(planner, "I have two square metres in the shade. What do I plant?", plans)
    doubt = await say(critic, f"The plan: {plan}", doubts)
    await say(planner, f"Somebody objects: {doubt}", plans)


asyncio.run(main())
