"""LlamaIndex needs no adapter: `prompt_cache_key` is one of its additional parameters.

Its packages want another version of OpenAI's client than the other frameworks, so this file has an environment of its own and
needs nothing of ours but the address and the token.

pip install llama-index-llms-openai-like
AGENTMEM_TOKEN=$(agentmem token show) python examples/llamaindex_recipe.py
"""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

URL = os.environ.get("AGENTMEM_URL", "http://127.0.0.1:8377")
PROMPTS = {
    "planner": "You plan a small garden. You answer in one short sentence.",
    "critic": "You find what is wrong with the last plan. You answer in one short sentence.",
}


def model(agent: str, session: str) -> OpenAILike:
    """A model for each agent."""
    return OpenAILike(
        model="default",
        api_base=f"{URL}/v1",
        api_key=os.environ["AGENTMEM_TOKEN"],
        is_chat_model=True,
        temperature=0,
        max_tokens=32,
        additional_kwargs={"prompt_cache_key": f"{agent}/{session}"},
    )


plan = "I have two square metres in the shade. What do I plant?"
for name, prompt in PROMPTS.items():
    reply = model(name, "garden").chat(
        [ChatMessage(role="system", content=prompt), ChatMessage(content=plan)]
    )
    usage = reply.raw.usage
    print(f"{name}: {reply.message.content}")
    print(
        f"  ({usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} prompt tokens were remembered)"
    )
    plan = str(reply.message.content)
