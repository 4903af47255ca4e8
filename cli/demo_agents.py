"""The three agents of the demo: what each has read, and what it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

TASK = "You answer questions about the following text. Answer in one short sentence.\n\n"


@dataclass(frozen=True, slots=True)
class DemoAgent:
    """An agent with a text in its system prompt and one question per turn: cold, hot, warm."""

    name: str
    text: str
    questions: tuple[str, str, str]

    @property
    def system_message(self) -> dict[str, str]:
        return {"role": "system", "content": TASK + self.text}


def _agent(name: str, cold: str, hot: str, warm: str) -> DemoAgent:
    text = resources.files("agentmem.cli").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")
    return DemoAgent(name, text.strip(), (cold, hot, warm))


def demo_agents() -> list[DemoAgent]:
    """The agents, in the order in which they are asked."""
    return [
        _agent(
            "lighthouse",
            "What is the name of the goat?",
            "How many steps does the staircase have?",
            "Who is the captain of the Petrel?",
        ),
        _agent(
            "bakery",
            "Where does the bakery stand?",
            "When do the doors open?",
            "What is the sourdough starter called?",
        ),
        _agent(
            "seedlibrary",
            "What does each jar get?",
            "What did the plant sale bring?",
            "When does the library open for loans?",
        ),
    ]
