"""Requests beside each other: cancelled, failing, too many, and many at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from agentmem.blockpool.tails import Tails
from agentmem.engine.batch import DecodeStep
from agentmem.engine.request import ChatRequest, Delta, Event, Finished, Sampling, Started
from agentmem.engine.runner import Work
from agentmem.errors import AgentMemError, BadRequest, ContextOverflow, Overloaded, StoreError
from agentmem.runtime import Runtime
from tests.runtime.agents import LONG, Running, ask, cached, memory, open_runtime, turn


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


def hold(runtime: Runtime, gate: threading.Event) -> None:
    """Keep the engine thread busy until `gate` is set, so that what is submitted now starts together."""
    started = threading.Event()

    def wait() -> None:
        started.set()
        gate.wait(60)

    runtime._engine.post(wait)
    assert started.wait(60)


def cancel_at(kind: type[Event], count: int = 1) -> tuple[Callable[[Event], None], Callable[[Running], None]]:
    """A sink that cancels its turn at the `count`-th event of a kind, on the engine thread itself."""
    running: list[Running] = []
    seen: list[Event] = []

    def at(event: Event) -> None:
        if isinstance(event, kind):
            seen.append(event)
            if len(seen) == count:
                running[0].ticket.cancel()

    return at, running.append


def cancelled(runtime: Runtime, request: ChatRequest, kind: type[Event], count: int = 1) -> Finished:
    """Run a turn that is cancelled when the event comes."""
    gate = threading.Event()
    hold(runtime, gate)
    at, hand_over = cancel_at(kind, count)
    running = Running(runtime, request, at)
    hand_over(running)
    gate.set()
    return running.end()


def test_cancelled_decode_keeps_what_was_said(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    stopped = cancelled(runtime, ask("ada", LONG, max_tokens=500), Delta, 3)
    assert stopped.finish_reason == "cancelled"
    said = stopped.usage["completion_tokens"]
    assert 3 <= said < 20
    after = turn(runtime, "ada", "go on")
    assert cached(after) == stopped.usage["prompt_tokens"] + said
    assert runtime.agent("ada")["turns"] == 2
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert cached(turn(runtime, "ada", "more")) >= after.usage["prompt_tokens"]
    runtime.close()


def test_a_prompt_whose_client_left_is_read_to_its_end_and_kept(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path, chunk_tokens=64)
    request = ask("ada", LONG, history="client")
    gate = threading.Event()
    hold(runtime, gate)
    running = Running(runtime, request)
    engine, chunks = runtime._engine, 0
    run = engine.run

    def count(work: Work) -> Any:
        nonlocal chunks
        chunks += len(work.chunks)
        if chunks == 2:
            running.ticket.cancel()
        return run(work)

    engine.run = count  # type: ignore
    gate.set()
    stopped = running.end()
    assert stopped.finish_reason == "cancelled"
    assert stopped.usage["completion_tokens"] == 0
    assert chunks == -(-stopped.usage["prompt_tokens"] // 64)
    again = turn(runtime, "ada", LONG, history="client")
    assert cached(again) == stopped.usage["prompt_tokens"] - 1
    runtime.close()
    fresh = open_runtime(tmp_path / "fresh", chunk_tokens=64)
    assert turn(fresh, "ada", LONG, history="client").text == again.text
    fresh.close()


def test_cancelled_before_its_start_leaves_nothing(tmp_path: Path, gate: threading.Event) -> None:
    runtime = open_runtime(tmp_path)
    hold(runtime, gate)
    running = Running(runtime, ask("ada", LONG))
    running.ticket.cancel()
    gate.set()
    assert running._over.wait(timeout=60)
    (last,) = running.events
    assert isinstance(last, Finished)
    assert last.finish_reason == "cancelled"
    assert runtime.agents() == []
    runtime.close()


def test_cancelled_while_it_waits_for_its_session(tmp_path: Path, gate: threading.Event) -> None:
    runtime = open_runtime(tmp_path)
    hold(runtime, gate)
    first = Running(runtime, ask("ada", LONG, max_tokens=20))
    second = Running(runtime, ask("ada", "too late"))
    second.ticket.cancel()
    gate.set()
    assert first.end().finish_reason == "length"
    assert second._over.wait(timeout=60)
    assert isinstance(second.events[-1], Finished)
    assert runtime.agent("ada")["turns"] == 1
    assert turn(runtime, "ada", "next").text
    runtime.close()


def test_a_failing_sequence_fails_alone(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = open_runtime(tmp_path)
    alone = open_runtime(tmp_path / "alone")
    want = [turn(alone, f"a{i}", f"{LONG} {i}", max_tokens=20).text for i in range(3)]
    alone.close()
    views = DecodeStep.views

    def broken(self: DecodeStep) -> Any:
        last = [t for table in self.tables for t in [*table.blocks[-1].tokens, *table.tail_tokens]]
        if ord("1") in last:
            raise RuntimeError("a kernel failed")
        return views(self)

    hold(runtime, gate)
    running = [Running(runtime, ask(f"a{i}", f"{LONG} {i}", max_tokens=20)) for i in range(3)]
    monkeypatch.setattr(DecodeStep, "views", broken)
    gate.set()
    assert running[0].end().text == want[0]
    with pytest.raises(AgentMemError, match="a kernel failed"):
        running[1].end()
    assert running[2].end().text == want[2]
    monkeypatch.undo()
    assert [a["agent"] for a in runtime.agents()] == ["a0", "a2"]
    runtime._call(runtime._pool.check)
    assert turn(runtime, "a1", f"{LONG} 1", max_tokens=20).text == want[1]
    runtime.close()


@pytest.mark.slow
def test_a_sequence_that_fails_with_its_token_fed_is_not_fed_it_again(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing a page fails when its last row is there already; who shares the step says what it would have said."""
    runtime = open_runtime(tmp_path)
    alone = open_runtime(tmp_path / "alone")
    want = [turn(alone, f"a{i}", f"{LONG} {i}", max_tokens=90).text for i in range(3)]
    alone.close()
    whole, asked = Tails.whole, list[list[int]]()

    def broken(self: Tails, layers: Sequence[int], places: Sequence[int]) -> mx.array:
        asked.append(list(places))
        if asked[0][0] in places:
            raise RuntimeError("packing failed")
        return whole(self, layers, places)

    hold(runtime, gate)
    running = [Running(runtime, ask(f"a{i}", f"{LONG} {i}", max_tokens=90)) for i in range(3)]
    monkeypatch.setattr(Tails, "whole", broken)
    gate.set()
    said = []
    for one in running:
        try:
            said.append(one.end().text)
        except AgentMemError as error:
            said.append(str(error))
    assert sum(one == other for one, other in zip(said, want, strict=True)) == 2
    assert sum("packing failed" in one for one in said) == 1
    assert sum(asked[0][0] in places for places in asked) <= 2  # with the others, then alone
    monkeypatch.undo()
    runtime._call(runtime._pool.check)
    assert runtime._call(lambda: runtime._pool.tails.used) == 0
    runtime.close()


def test_many_agents_at_once_all_get_their_own_answer(tmp_path: Path) -> None:
    names = [f"agent-{i}" for i in range(8)]
    texts = [LONG[: 40 * i + 7] + str(i) for i in range(8)]
    # In 8 bits: who comes first decides which rows of a common prefix are packed when the others read them.
    one = open_runtime(tmp_path / "one", kv_format="q8-plain")
    want = [[turn(one, n, t).text, turn(one, n, "and then?").text] for n, t in zip(names, texts, strict=True)]
    one.close()
    runtime = open_runtime(tmp_path / "many", kv_format="q8-plain")

    def both(pair: tuple[str, str]) -> list[str]:
        return [turn(runtime, pair[0], pair[1]).text, turn(runtime, pair[0], "and then?").text]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(both, zip(names, texts, strict=True))) == want
    runtime._call(runtime._pool.check)
    runtime.close()


def test_equal_first_turns_of_many_agents_at_once_are_all_kept(tmp_path: Path, gate: threading.Event) -> None:
    runtime = open_runtime(tmp_path)
    hold(runtime, gate)
    running = [Running(runtime, ask(f"a{i}", LONG)) for i in range(6)]
    gate.set()
    replies = [r.end() for r in running]
    assert len({r.text for r in replies}) == 1
    assert all(memory(r)["committed"] for r in replies)
    runtime.forget("a0")
    runtime.close()
    runtime = open_runtime(tmp_path)
    for i in range(1, 6):
        assert cached(turn(runtime, f"a{i}", "go on")) > 300
    assert runtime.health()["status"] == "ok"
    runtime.close()


def test_turns_of_one_session_run_one_after_the_other(tmp_path: Path, gate: threading.Event) -> None:
    runtime = open_runtime(tmp_path)
    hold(runtime, gate)
    running = [Running(runtime, ask("ada", f"message {i}")) for i in range(5)]
    gate.set()
    replies = [r.end() for r in running]
    sizes = [r.usage["prompt_tokens"] for r in replies]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 5
    assert [cached(r) for r in replies[1:]] == [
        s + r.usage["completion_tokens"] for s, r in zip(sizes, replies, strict=True)
    ][:-1]
    assert runtime.agent("ada")["turns"] == 5
    runtime.close()
    runtime = open_runtime(tmp_path)
    assert cached(turn(runtime, "ada", "last")) == sizes[-1] + replies[-1].usage["completion_tokens"]
    runtime.close()


def test_a_full_queue_refuses_at_once(tmp_path: Path, gate: threading.Event) -> None:
    runtime = open_runtime(tmp_path, queue_limit=3)
    hold(runtime, gate)
    running = [Running(runtime, ask(f"a{i}", "hello")) for i in range(3)]
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        runtime.chat(ask("late", "hello"), lambda _: None)
    gate.set()
    assert all(r.end().text for r in running)
    assert turn(runtime, "late", "hello").text
    runtime.close()


@pytest.mark.slow
def test_requests_that_together_exceed_the_budget_take_turns(tmp_path: Path, gate: threading.Event) -> None:
    """Each fits alone; an edit of the same session beside them must still see the turn before it."""
    runtime = open_runtime(tmp_path, ram_budget=1 << 20)
    capacity = runtime.store()["ram"]["capacity_bytes"]
    hold(runtime, gate)
    running = [Running(runtime, ask(f"a{i}", f"{i} {LONG * 4}")) for i in range(4)]
    gate.set()
    assert all(r.end().text for r in running)
    assert runtime.store()["ram"]["used_bytes"] <= capacity
    runtime._call(runtime._pool.check)
    runtime.close()


def test_replies_that_end_while_all_slots_wait_to_be_written_are_kept(tmp_path: Path) -> None:
    """Nothing can be evicted before the writer is done: who needs slots waits for it, and keeps nobody else waiting."""
    runtime = open_runtime(tmp_path, ram_budget=1 << 20, commit="none")
    gate = threading.Event()
    runtime._store._jobs.put(lambda: gate.wait(60))
    running = [Running(runtime, ask(f"a{i}", f"{i} {LONG[: 9 * i]}", max_tokens=12)) for i in range(24)]
    full = threading.Event()
    for _ in range(600):
        if runtime._call(lambda: bool(runtime._engine._again)):
            full.set()
            break
        full.wait(0.05)
    assert full.is_set(), "the budget is too large for this test"
    assert not all(r._over.is_set() for r in running)
    gate.set()
    assert all(r.end().text for r in running)
    runtime._call(runtime._pool.check)
    runtime.close()


@pytest.mark.slow
def test_a_small_turn_does_not_slip_in_before_a_large_one_of_its_session(
    tmp_path: Path, gate: threading.Event
) -> None:
    """The large one waits for room; what it was rendered from must not change behind its back."""
    runtime = open_runtime(tmp_path, ram_budget=1 << 20)
    turn(runtime, "ada", "hello")
    hold(runtime, gate)
    filler = Running(runtime, ask("filler", LONG * 5, max_tokens=60))
    large = Running(runtime, ask("ada", f"LARGE {LONG * 5}"))
    small = Running(runtime, ask("ada", "small"))
    gate.set()
    for running in (filler, large, small):
        running.end()
    first, second = large.end(), small.end()
    assert second.usage["prompt_tokens"] > first.usage["prompt_tokens"]
    assert cached(second) == first.usage["prompt_tokens"] + first.usage["completion_tokens"]
    state = runtime._call(lambda: runtime._memory.find("default", "ada").sessions["default"])
    assert [m["content"][:5] for m in state.conversation.messages if m["role"] == "user"] == [
        "hello",
        "LARGE",
        "small",
    ]
    chain = [int(t) for p in state.head.chain() for t in p.tokens] if state.head else []
    assert chain == state.conversation.ids[: len(chain)]
    runtime.close()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_tokens": 1 << 30}, ContextOverflow, "the context holds"),
        ({"max_tokens": 8000}, ContextOverflow, "Raise ram_budget or lower max_tokens"),
        ({"sampling": Sampling(logit_bias={999_999_999: 5.0})}, BadRequest, "logit_bias"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing(
    tmp_path: Path, options: dict[str, Any], error: type[AgentMemError], says: str
) -> None:
    runtime = open_runtime(tmp_path, ram_budget=2 << 20)
    with pytest.raises(error, match=says):
        turn(runtime, "ada", "hello", **options)
    assert runtime.agents() == []
    turn(runtime, "ada", "hello")
    before = runtime.agent("ada")
    with pytest.raises(error, match=says):
        turn(runtime, "ada", "hello", **options)
    assert runtime.agent("ada") == before
    runtime.close()


def test_close_ends_running_replies_and_keeps_them(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    said = threading.Event()
    running = Running(
        runtime, ask("ada", LONG, max_tokens=2000), lambda e: said.set() if isinstance(e, Delta) else None
    )
    assert said.wait(60)
    runtime.close()
    last = running.end()
    assert last.finish_reason == "cancelled"
    assert memory(last)["committed"]
    with pytest.raises(StoreError, match="stopped"):
        runtime.chat(ask("ada", "hello"), lambda _: None)
    runtime = open_runtime(tmp_path)
    assert (
        cached(turn(runtime, "ada", "go on")) == last.usage["prompt_tokens"] + last.usage["completion_tokens"]
    )
    runtime.close()


def test_events_come_in_order(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path)
    running = Running(runtime, ask("ada", LONG))
    running.end()
    kinds = [type(e) for e in running.events]
    assert kinds[0] is Started
    assert kinds[-1] is Finished
    assert set(kinds[1:-1]) == {Delta}
    runtime.close()
