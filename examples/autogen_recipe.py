"""AutoGen needs no adapter: `prompt_cache_key` is a parameter of its client.

Run it twice: the second time both agents begin with what they know.

pip install autogen-agentchat "autogen-ext[openai]" && agentmem up && python examples/autogen_recipe.py
"""

import asyncio
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient

from agentmem.client import AgentMemClient
from agentmem.daemon import find_endpoint

PROMPTS = {
    "planner": "You plan a small garden. You answer in one short sentence.",
    "critic": "You find what is wrong with the last plan. You answer in one short sentence.",
}

daemon = find_endpoint()  # reads the address and the token out of the home folder
memory = AgentMemClient()


def agent(name: str, session: str) -> AssistantAgent:
    """An agent has a client of its own: the key is the client's."""
    options: dict[str, Any] = {"prompt_cache_key": f"{name}/{session}", "temperature": 0, "max_tokens": 32}
    client = OpenAIChatCompletionClient(
        model=memory.models()[0]["id"],
        base_url=f"{daemon.url}/v1",
        api_key=daemon.token or "none",
        model_info={
            "vision": False,
            "function_calling": False,
            "json_output": False,
            "structured_output": False,
            "family": "unknown",
        },
        **options,
    )
    return AssistantAgent(name, client, system_message=PROMPTS[name])


async def main() -> None:
    team = RoundRobinGroupChat([agent(name, "garden") for name in PROMPTS], max_turns=4)
    result = await team.run(task="I have two square metres in the shade. What do I plant?")
    for message in result.messages:
        print(f"{message.source}: {getattr(message, 'content', '')}")


asyncio.run(main())
# AutoGen counts no cached tokens, but the daemon does: of the last turn of each.
for name in PROMPTS:
    turn = memory.explain(name, "garden")
    print(f"{name}: {turn['exact_tokens']} of {turn['prompt_tokens']} prompt tokens were remembered")
