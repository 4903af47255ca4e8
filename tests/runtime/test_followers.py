"""Requests that begin alike at the same time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from agentmem.engine.request import Delta, Started
from agentmem.engine.runner import Work
from tests.runtime.agents import LONG, Running, ask, memory, open_runtime, turn
from tests.runtime.test_requests import hold


def test_one_prefills_and_the_others_go_on_from_its_state(tmp_path: Path) -> None:
    alone = open_runtime(tmp_path / "alone")
    want = turn(alone, "a", LONG + " 0", max_tokens=12).text
    alone.close()
    runtime, gate = open_runtime(tmp_path), threading.Event()
    hold(runtime, gate)
    running = [Running(runtime, ask(f"a{i}", LONG + f" {i}", max_tokens=12)) for i in range(4)]
    gate.set()
    ends = [r.end() for r in running]
    prompt = ends[0].usage["prompt_tokens"]
    assert ends[0].text == want
    assert [memory(e)["exact_tokens"] > 0.8 * prompt for e in ends] == [False, True, True, True]
    for r, end in zip(running, ends, strict=True):
        started = next(e for e in r.events if isinstance(e, Started))
        assert started.cached_tokens == memory(end)["exact_tokens"]
    runtime._call(runtime._pool.check)
    assert runtime.store()["unique_bytes"] < 0.6 * runtime.store()["without_sharing_bytes"]
    runtime.close()


def test_a_leader_that_is_cancelled_leaves_its_state_or_the_prompt_to_the_next(tmp_path: Path) -> None:
    alone = open_runtime(tmp_path / "alone", chunk_tokens=64)
    want = turn(alone, "a", LONG, max_tokens=12).text
    alone.close()
    runtime, gate = open_runtime(tmp_path, chunk_tokens=64), threading.Event()
    hold(runtime, gate)
    first, second = (Running(runtime, ask(f"a{i}", LONG, max_tokens=12)) for i in range(2))
    run = runtime._engine.run

    def cancel_first(work: Work) -> Any:
        """Its first chunk has run when the second step is planned."""
        if work.chunks:
            first.ticket.cancel()
        return run(work)

    runtime._engine.run = cancel_first  # type: ignore[method-assign]
    gate.set()
    assert first.end().finish_reason == "cancelled"
    assert second.end().text == want
    runtime._call(runtime._pool.check)
    runtime.close()


def test_spaces_do_not_follow_each_other(tmp_path: Path) -> None:
    runtime, gate = open_runtime(tmp_path), threading.Event()
    hold(runtime, gate)
    requests = [ask("a", LONG, max_tokens=4), ask("a", LONG, max_tokens=4)]
    requests[1].namespace = "other"
    running = [Running(runtime, r) for r in requests]
    gate.set()
    assert [memory(r.end())["exact_tokens"] for r in running] == [0, 0]
    runtime.close()


def test_further_replies_of_a_running_request_lead_too(tmp_path: Path) -> None:
    """While several replies to a prompt are made, a request that begins with it goes on from their state."""
    runtime = open_runtime(tmp_path)
    started = threading.Event()
    request = ask("a", LONG, max_tokens=200)
    request.n = 3
    first = Running(runtime, request, lambda event: isinstance(event, Delta) and started.set())
    assert started.wait(60)
    second = Running(runtime, ask("b", LONG + " more", max_tokens=4)).end()
    first.ticket.cancel()
    first.end()
    assert memory(second)["exact_tokens"] > 0.8 * second.usage["prompt_tokens"]
    runtime._call(runtime._pool.check)
    runtime.close()
