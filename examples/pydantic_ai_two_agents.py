"""pydantic-ai: an author and an editor in one conversation, each with a memory of its own.

Run it twice: the second time they begin with what they remember.

pip install "agentmem-mlx[pydantic-ai]" && agentmem up && python examples/pydantic_ai_two_agents.py
"""

from typing import Any

from pydantic_ai import Agent, ModelSettings

from agentmem.adapters.pydantic_ai import AgentMemory, model

daemon = model(settings=ModelSettings(temperature=0, max_tokens=32))  # finds the running daemon by itself
memory = AgentMemory()
author = Agent(
    daemon,
    name="author",
    instructions="You write a children's story, one short sentence at a time.",
    capabilities=[memory],
)
editor = Agent(
    daemon,
    name="editor",
    instructions="You say in one short sentence what is to be better in a story.",
    capabilities=[memory],
)

drafts: list[Any] = []
remarks: list[Any] = []
for text in ("Begin with a fox who cannot sleep.", "And now it begins to snow."):
    draft = author.run_sync(text, message_history=drafts, conversation_id="story")
    remark = editor.run_sync(draft.output, message_history=remarks, conversation_id="story")
    drafts, remarks = draft.all_messages(), remark.all_messages()
    for name, result in (("author", draft), ("editor", remark)):
        usage = result.usage
        print(f"{name}: {result.output.strip()}")
        print(f"  ({usage.cache_read_tokens} of {usage.input_tokens} prompt tokens were remembered)")
