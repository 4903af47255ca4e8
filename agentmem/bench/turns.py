"""Turns on a runtime in this process."""

from __future__ import annotations

import queue
from typing import Any

from agentmem.engine.request import ChatRequest, Event, Failed, Finished
from agentmem.runtime import Runtime


def finished_turn(runtime: Runtime, agent: str, messages: list[dict[str, Any]], reply: int) -> Finished:
    """One turn of a whole conversation; raises what it failed with."""
    return _run(runtime, ChatRequest(agent, messages, max_tokens=reply))


def say_in_turn(runtime: Runtime, agent: str, text: str, max_tokens: int = 4) -> dict[str, Any]:
    """One more turn of a session that the runtime keeps; returns its usage."""
    messages = [{"role": "user", "content": text}]
    return _run(runtime, ChatRequest(agent, messages, history="server", max_tokens=max_tokens)).usage


def _run(runtime: Runtime, request: ChatRequest) -> Finished:
    events: queue.Queue[Event] = queue.Queue()
    runtime.chat(request, events.put)
    while not isinstance(event := events.get(), Finished):
        if isinstance(event, Failed):
            raise event.error
    return event
