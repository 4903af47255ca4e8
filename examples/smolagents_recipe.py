"""smolagents needs no adapter: `prompt_cache_key` is a parameter of its model.

Run it twice: the second time the agents begin with what they know.

pip install "smolagents[openai]" && agentmem up && python examples/smolagents_recipe.py
"""

from smolagents import ChatMessage, MessageRole, OpenAIModel

from agentmem.daemon import find_endpoint

PROMPTS = {
    "planner": "You plan a small garden. You answer in one short sentence.",
    "critic": "You find what is wrong with the last plan. You answer in one short sentence.",
}

daemon = find_endpoint()  # reads the address and the token out of the home folder


def model(agent: str, session: str) -> OpenAIModel:
    """A model for each agent, for example as `CodeAgent(tools=[], model=model("planner", "garden"))`."""
    return OpenAIModel(
        "default",
        api_base=f"{daemon.url}/v1",
        api_key=daemon.token or "none",
        prompt_cache_key=f"{agent}/{session}",
        temperature=0,
        max_tokens=32,
    )


plan = "I have two square metres in the shade. What do I plant?"
for name in PROMPTS:
    messages = [
        ChatMessage(MessageRole.SYSTEM, [{"type": "text", "text": PROMPTS[name]}]),
        ChatMessage(MessageRole.USER, [{"type": "text", "text": plan}]),
    ]
    reply = model(name, "garden").generate(messages)
    usage = reply.raw.usage
    print(f"{name}: {reply.content}")
    print(
        f"  ({usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} prompt tokens were remembered)"
    )
    plan = str(reply.content)
