"""Questions with one right answer: facts hidden in a long text, and calls of tools. The same for everybody."""

from __future__ import annotations

import inspect
import json
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import product
from typing import Any

from agentmem.engine import conversation, memory, planner

PLACES = ("north gate", "boat house", "old archive", "lamp room", "harbour office", "bell tower")
DEPTHS = (0.15, 0.5, 0.85)
CITIES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Tallinn")
TOPICS = (
    "assignment",
    "specialnames",
    "formatstrings",
    "execmodel",
    "import",
    "class",
    "try",
    "string-methods",
)
LEAST = 4_000
"""Letters of a text that are surely enough for `HISTORY` and the tokens behind it."""


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, and what the reply must be: it contains `answer`, or it is this call, of which `arguments` is a part."""

    name: str
    messages: tuple[dict[str, Any], ...]
    answer: str
    tools: tuple[dict[str, Any], ...] = ()
    arguments: str = ""


def texts() -> dict[str, str]:
    """Texts that no calibration has seen: this project's handbooks and source, and the language reference that Python brings."""
    folder = resources.files("agentmem.cli").joinpath("texts")
    found = {f.name: f.read_text(encoding="utf-8") for f in folder.iterdir() if f.name.endswith(".txt")}
    found = dict(sorted(found.items()))
    found |= {m.__name__: inspect.getsource(m) for m in (conversation, memory, planner)}
    found |= {name: pydoc_data.topics.topics[name] for name in TOPICS}
    return {name: text for name, text in found.items() if len(text) >= LEAST}


def needles(count: int, letters: int = 1_600) -> list[Case]:
    """A number in the middle of a handbook, then the question for it."""
    handbooks = [text for name, text in texts().items() if name.endswith(".txt")]
    cases: list[Case] = []
    for number, (depth, place) in enumerate(product(DEPTHS * 9, PLACES)):
        if len(cases) == count:
            break
        code = str(1000 + 7919 * (number + 1) % 9000)
        text = handbooks[number % len(handbooks)][131 * number % 900 :][:letters]
        at = text.find("\n", int(depth * len(text))) + 1 or int(depth * len(text))
        hidden = f"{text[:at]}The code of the {place} is {code}.\n{text[at:]}"
        asked = f"{hidden}\n\nWhat is the code of the {place}? Answer with the number."
        cases.append(Case(f"needle {number}: {place}", ({"role": "user", "content": asked},), code))
    return cases


def calls(count: int) -> list[Case]:
    """Requests that one of three tools answers, with its call as Hermes' notation writes it."""
    found: list[Case] = []
    for number, (text, name, arguments) in zip(range(count), _requests(), strict=False):
        call = json.dumps({"name": name, "arguments": arguments})
        messages = ({"role": "system", "content": _handbook(number)}, {"role": "user", "content": text})
        found.append(Case(f"call {number}: {name}", messages, call, TOOLS, json.dumps(arguments)))
    return found


def _requests() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for number, city in enumerate(CITIES * 9):
        hour, unit = 6 + number % 12, ("celsius", "fahrenheit")[number % 2]
        yield f"How warm is it in {city}, in {unit}?", "get_weather", {"city": city, "unit": unit}
        yield (
            f"Wake me at {hour}:30 for the train to {city}.",
            "set_alarm",
            {"time": f"{hour}:30", "label": f"train to {city}"},
        )
        yield (
            f"Send {city} harbour the message 'ready at {hour}'.",
            "send_message",
            {"to": f"{city} harbour", "text": f"ready at {hour}"},
        )


def _handbook(number: int) -> str:
    text = next(iter(texts().values()))
    return f"You call tools. {text[97 * number % 700 :][:1200]}"


def _tool(name: str, about: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": what} for key, what in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


TOOLS = (
    _tool("get_weather", "The weather of a city.", city="its name", unit="celsius or fahrenheit"),
    _tool("set_alarm", "Set an alarm.", time="hours and minutes", label="what it is for"),
    _tool("send_message", "Send a message.", to="who gets it", text="what it says"),
)
