"""Who waits, and who is turned away at the door."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agentmem.engine.request import ChatRequest, Delta
from agentmem.errors import Overloaded
from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, Running, ask, open_runtime, turn


def lobby_of(runtime: Runtime):  # type: ignore[no-untyped-def]
    return runtime._engine.lobby


def test_a_wait_that_is_predicted_too_long_is_refused_with_the_time_to_come_back(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path, max_batch=2, max_wait_s=10, queue_limit=8)
    lobby = lobby_of(runtime)
    lobby.check(0, 2)
    for _ in range(2):
        lobby.pace.turn_ended(6000.0)
    lobby.check(2, 2)  # 3 turns of 6 s, two at a time
    with pytest.raises(Overloaded, match=r"would wait about 12 s") as refused:
        lobby.check(3, 2)
    assert refused.value.retry_after_ms == 3000
    with pytest.raises(Overloaded, match="8 requests are waiting") as refused:
        lobby.check(8, 2)
    assert refused.value.retry_after_ms == 3000
    runtime.close()


def test_nobody_is_refused_for_a_wait_while_there_is_room(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path, max_batch=2, max_wait_s=1)
    for _ in range(2):
        lobby_of(runtime).pace.turn_ended(60_000.0)
    assert turn(runtime, "ada", "hello").text
    runtime.close()


def test_a_small_request_is_admitted_before_a_large_one_and_a_session_stays_in_order(tmp_path: Path) -> None:
    """With one place: what is small goes first, but not before an earlier request of its own session."""
    runtime = open_runtime(tmp_path, max_batch=1)
    gate, order = threading.Event(), list[str]()
    runtime._engine.post(lambda: gate.wait(60))

    def run(request: ChatRequest, name: str) -> Running:
        return Running(runtime, request, lambda e: order.append(name) if isinstance(e, Delta) else None)

    running = [
        run(ask("ada", LONG), "large"),
        run(ask("bob", "hello"), "small"),
        run(ask("ada", "and?"), "second"),
    ]
    gate.set()
    for one in running:
        one.end()
    assert list(dict.fromkeys(order)) == ["small", "large", "second"]
    runtime.close()
