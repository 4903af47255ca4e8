"""LangGraph: a planner and a critic in one thread, each with a memory of its own.

Run it twice: the second time they begin with what they remember.

pip install "agentmem-mlx[langchain]" && agentmem up && python examples/langgraph_two_agents.py
"""

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph

from agentmem.adapters.langchain import AgentMemMiddleware, AgentMemSaver, ChatAgentMem

PROMPTS = {
    "planner": "You plan a small garden. You answer in one short sentence.",
    "critic": "You find what is wrong with the last plan. You answer in one short sentence.",
}

model = ChatAgentMem(temperature=0, max_completion_tokens=32)  # finds the running daemon by itself
graph = StateGraph(MessagesState)
for name, prompt in PROMPTS.items():
    agent = create_agent(model, tools=[], name=name, system_prompt=prompt, middleware=[AgentMemMiddleware()])
    graph.add_node(name, agent)
graph.add_edge(START, "planner")
graph.add_edge("planner", "critic")
graph.add_edge("critic", END)
saver = AgentMemSaver(InMemorySaver())
garden = graph.compile(checkpointer=saver)


def say(text: str, thread: str) -> None:
    """One round; what the agents said, and how much of their prompts they remembered."""
    found = garden.invoke({"messages": [HumanMessage(text)]}, {"configurable": {"thread_id": thread}})
    for name, reply in zip(PROMPTS, found["messages"][-2:], strict=True):
        assert isinstance(reply, AIMessage)
        assert reply.usage_metadata
        cached = reply.usage_metadata["input_token_details"]["cache_read"]
        print(f"{name}: {reply.text.strip()}")
        print(f"  ({cached} of {reply.usage_metadata['input_tokens']} prompt tokens were remembered)")


say("I have two square metres in the shade.", "garden")
say("And one bench. Where does it go?", "garden")
saver.copy_thread("garden", "garden-with-pond")  # both threads go on from here
say("And if there were a pond?", "garden-with-pond")
