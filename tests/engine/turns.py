"""Driving a runtime from a test: blocking turns and random conversations."""

from __future__ import annotations

import queue
import random
from dataclasses import dataclass
from typing import Any

from agentmem.engine.request import ChatRequest, Delta, Event, Failed, Finished, Started
from agentmem.runtime import Runtime

WORDS = [
    "the",
    "lamp",
    "oil",
    "tide",
    "harbour",
    "ledger",
    "winter",
    "bread",
    "seed",
    "wheel",
    "42",
    "2026",
    "night",
    "river",
    "who",
    "why",
    "keeps",
    "counts",
    "writes",
    "under",
    "over",
    "never",
    "always",
    "north",
    "copper",
    "glass",
    "letters",
    "(see)",
    "[note]",
    "don't",
    "ümlaut",
    "漢字",
    "🙂",
    "x=1;",
    "return",
]


@dataclass
class Turn:
    """What one blocking turn gave."""

    text: str
    streamed: str
    started: Started | None
    usage: dict[str, Any]
    finish_reason: str

    @property
    def memory(self) -> dict[str, Any]:
        return dict(self.usage["agentmem"])


def say(runtime: Runtime, request: ChatRequest, timeout: float = 240.0) -> Turn:
    """Run one turn to its end; raises what it failed with."""
    events: queue.Queue[Event] = queue.Queue()
    runtime.chat(request, events.put)
    started, streamed = None, ""
    while True:
        event = events.get(timeout=timeout)
        if isinstance(event, Started):
            started = event
        elif isinstance(event, Delta):
            streamed += event.text
        elif isinstance(event, Finished):
            return Turn(event.text, streamed, started, event.usage, event.finish_reason)
        else:
            assert isinstance(event, Failed)
            raise event.error


def words(rng: random.Random, n: int) -> str:
    """About `n` words of text."""
    return " ".join(rng.choice(WORDS) for _ in range(n))


def script(rng: random.Random, *, turns: int, longest: int) -> list[tuple[str, int]]:
    """User messages and reply limits of one conversation: lengths from one word to `longest` words."""
    sizes = [
        1,
        2,
        rng.randrange(3, 20),
        rng.randrange(20, max(21, longest // 3)),
        rng.randrange(longest // 2, longest),
    ]
    return [(words(rng, rng.choice(sizes)), rng.choice([1, 2, 3, 7, 12])) for _ in range(turns)]
