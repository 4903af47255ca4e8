"""Two agents, one model, two memories: each knows only what it was told, and knows it after a restart too.

agentmem up && python examples/two_agents.py
"""

from agentmem.client import AgentMemClient

with AgentMemClient() as client:
    client.append("gardener", "Remember: the roses are watered on Tuesday.", role="system")
    client.append("cook", "Remember: the soup is made of leeks.", role="system")

    for agent, question in [
        ("gardener", "When are the roses watered?"),
        ("cook", "What is the soup made of?"),
    ]:
        reply = client.chat(agent, question, temperature=0, max_tokens=32)
        memory = reply.memory
        print(f"{agent}: {reply.text.strip()}")
        print(f"  {memory['exact_tokens']} tokens remembered, {memory['prefilled_tokens']} read anew")

    for info in client.agents():
        print(
            f"{info['agent']}: {info['tokens']} tokens, {info['disk_bytes']} bytes on disk, {info['state']}"
        )
