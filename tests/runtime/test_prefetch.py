"""Pages of requests that wait are read while others speak."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.engine.request import Delta
from tests.runtime.agents import LONG, Running, ask, cached, extents, memory, open_runtime, turn


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home where three agents have state on disk."""
    runtime = open_runtime(tmp_path)
    for name in ("ada", "bob", "cyd"):
        turn(runtime, name, f"{name} {LONG}")
    runtime.close()
    return tmp_path


class Busy:
    """A runtime whose only place is taken by one long reply; `queued` requests wait behind it."""

    def __init__(self, home: Path, *queued: str, reply: int = 2000, **options: Any) -> None:
        self.runtime = open_runtime(home, max_batch=1, **options)
        spoke = threading.Event()
        self.speaker = Running(
            self.runtime,
            ask("speaker", "hello", max_tokens=reply, namespace="other"),
            lambda e: spoke.set() if isinstance(e, Delta) else None,
        )
        assert spoke.wait(20), self.speaker.events
        self.queued = [Running(self.runtime, ask(name, "go on")) for name in queued]

    def pages(self) -> int:
        return int(self.runtime.health()["scheduler"]["prefetched_pages"])

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it while the speaker goes on speaking."""
        deadline = time.monotonic() + 30
        while not condition():
            assert not self.speaker._over.is_set(), "the reply was over first"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def in_ram(self, name: str) -> bool:
        return self.runtime.agent(name)["state"] == "hot"

    def pins(self) -> int:
        return self.runtime._call(lambda: sum(p.pins for t in self.runtime._pool.trees() for p in t.pages()))


@pytest.fixture
def busy() -> Iterator[Callable[..., Busy]]:
    made: list[Busy] = []

    def make(*args: Any, **options: Any) -> Busy:
        made.append(Busy(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.runtime.close()


def test_state_is_there_before_its_request_is_admitted(home: Path, busy: Callable[..., Busy]) -> None:
    b = busy(home, "ada", "bob")
    b.until(lambda: b.in_ram("ada") and b.in_ram("bob"))
    assert not b.in_ram("cyd")
    assert b.runtime.health()["waiting"] == 2
    assert b.runtime.health()["scheduler"]["prefetched_requests"] == 2
    b.speaker.ticket.cancel()
    for running in b.queued:
        end = running.end()
        assert cached(end) > 300
        assert memory(end)["state_before"] == "warm"
        assert memory(end)["restored_tokens"] >= cached(end)
        assert memory(end)["restore_ms"] == 0
    assert b.pins() == 0


def test_a_cancelled_request_gives_its_pages_free(home: Path, busy: Callable[..., Busy]) -> None:
    b = busy(home, "ada")
    b.until(lambda: b.in_ram("ada"))
    assert b.pins() > 0
    b.queued[0].ticket.cancel()
    b.until(lambda: b.runtime.health()["waiting"] == 0)
    b.until(lambda: b.pins() == 0)
    b.runtime.evict("ada")
    assert not b.in_ram("ada")


def test_nothing_is_read_ahead_where_those_who_run_may_need_the_room(
    home: Path, busy: Callable[..., Busy]
) -> None:
    """The speaker may fill the pool; the request waits with its pages on disk, and is served afterwards."""
    b = busy(home, "ada", reply=1000, ram_budget=700 << 10)
    before = len(b.speaker.events)
    b.until(lambda: len(b.speaker.events) > before + 20)
    assert b.pages() == 0
    b.speaker.ticket.cancel()
    assert cached(b.queued[0].end()) > 300


def test_damage_that_is_found_ahead_of_time_costs_only_the_reuse(
    home: Path, busy: Callable[..., Busy]
) -> None:
    for path in extents(home):
        data = bytearray(path.read_bytes())
        data[-64] ^= 1
        path.write_bytes(data)
    b = busy(home, "ada")
    b.until(lambda: b.runtime.store()["disk"]["quarantined"] > 0)
    b.speaker.ticket.cancel()
    assert b.queued[0].end().text
    assert b.pins() == 0


def test_an_agent_that_is_forgotten_meanwhile(home: Path, busy: Callable[..., Busy]) -> None:
    """Nothing of it stays, though its pages were held for a request."""
    b = busy(home, "ada")
    b.until(lambda: b.in_ram("ada"))

    def pages() -> int:
        return b.runtime._call(lambda: len(list(b.runtime._pool.tree("default").pages())))

    before, bob = pages(), len(b.runtime._call(lambda: b.runtime._memory.find("default", "bob").pages()))
    b.runtime.forget("ada")
    assert pages() <= before - bob + 1
    b.speaker.ticket.cancel()
    assert b.queued[0].end().usage["prompt_tokens"] < 50
    assert b.pins() == 0
    b.runtime._call(b.runtime._pool.check)
