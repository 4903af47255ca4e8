"""CrewAI needs no adapter: `prompt_cache_key` is a parameter of its model, one model for each agent.

Its packages want another version of OpenAI's client than the other frameworks, so this file has an environment of its own and
needs nothing of ours but the address and the token.

pip install crewai
AGENTMEM_TOKEN=$(agentmem token show) python examples/crewai_recipe.py
"""

import os

from crewai import LLM, Agent, Crew, Task

URL = os.environ.get("AGENTMEM_URL", "http://127.0.0.1:8377")


def model(agent: str, session: str) -> LLM:
    """A model for each agent."""
    return LLM(
        model="openai/default",
        base_url=f"{URL}/v1",
        api_key=os.environ["AGENTMEM_TOKEN"],
        temperature=0,
        max_tokens=32,
        additional_params={"prompt_cache_key": f"{agent}/{session}"},
    )


def agent(name: str, goal: str) -> Agent:
    return Agent(
        role=name,
        goal=goal,
        backstory="You answer in one short sentence.",
        llm=model(name, "garden"),
        max_iter=1,
    )


planner, critic = agent("planner", "Plan a small garden."), agent("critic", "Find what is wrong with a plan.")
plan = Task(description="Plan two square metres in the shade.", expected_output="A plan.", agent=planner)
review = Task(
    description="Say what is wrong with the plan.", expected_output="A review.", agent=critic, context=[plan]
)
print(Crew(agents=[planner, critic], tasks=[plan, review]).kickoff())
