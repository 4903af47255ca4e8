"""Runtimes on tiny models, and what their homes hold."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentmem.engine.request import ChatRequest, Delta, Event, Failed, Finished, Started, Ticket
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings

LONG = "the lamp keeper counts the oil and writes it down, night by night, before the tide comes in; " * 4
BUDGET = 8 << 20


def open_runtime(home: Path, **options: Any) -> Runtime:
    """A runtime over the tiny model, always the same one. No target for its tokens: cuts that depend on the time change bits."""
    settings = Settings(home=home, **{"ram_budget": BUDGET, "itl_target_ms": 1e6, **options})
    return Runtime.open(settings, lambda: random_model("llama", seed=0))


class Running:
    """A turn that has been submitted."""

    def __init__(
        self, runtime: Runtime, request: ChatRequest, at: Callable[[Event], None] = lambda _: None
    ) -> None:
        self.events: list[Event] = []
        self._at = at
        self._over = threading.Event()
        self.ticket: Ticket = runtime.chat(request, self._sink)

    def _sink(self, event: Event) -> None:
        self.events.append(event)
        self._at(event)
        if isinstance(event, Finished | Failed):
            self._over.set()

    def end(self) -> Finished:
        """Wait for the end; raises what the turn failed with."""
        assert self._over.wait(timeout=120), "the turn never ended"
        last = self.events[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Finished)
        assert isinstance(self.events[0], Started)
        for index, choice in enumerate(last.choices):
            deltas = [e for e in self.events if isinstance(e, Delta) and e.index == index]
            assert "".join(e.text for e in deltas) == choice.text
            shown = [one for e in deltas for one in e.logprobs or ()]
            assert shown == list(choice.logprobs or ())
        return last


def ask(agent: str, text: str, **options: Any) -> ChatRequest:
    """One more message of a conversation that the daemon keeps."""
    fields = {"history": "server", "max_tokens": 6, **options}
    return ChatRequest(agent=agent, messages=[{"role": "user", "content": text}], **fields)


def turn(runtime: Runtime, agent: str, text: str, **options: Any) -> Finished:
    return Running(runtime, ask(agent, text, **options)).end()


def cached(finished: Finished) -> int:
    return int(finished.usage["prompt_tokens_details"]["cached_tokens"])


def memory(finished: Finished) -> dict[str, Any]:
    return dict(finished.usage["agentmem"])


def extents(home: Path) -> list[Path]:
    return sorted((home / "store" / "extents").iterdir())


def quarantined(home: Path) -> list[str]:
    folder = home / "store" / "quarantine"
    return sorted(os.listdir(folder)) if folder.exists() else []
