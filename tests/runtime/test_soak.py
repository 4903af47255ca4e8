"""Many short requests of many clients, some of which go away: nothing hangs, nothing is left behind.

`AGENTMEM_SOAK=10000 pytest -n 0 tests/runtime/test_soak.py` is the long run.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import psutil
import pytest

from agentmem.engine.request import Finished
from agentmem.errors import Overloaded
from tests.runtime.agents import LONG, Running, ask, open_runtime

REQUESTS = int(os.environ.get("AGENTMEM_SOAK", "600"))
CLIENTS = 32
AGENTS = 40
GROWTH = 64 << 20
"""Bytes that the process may grow by after the first fifth: threads' stacks and heaps that are not given back."""


@pytest.mark.slow(minutes=0.5)
def test_nothing_hangs_and_nothing_is_left(tmp_path: Path) -> None:
    runtime = open_runtime(tmp_path, itl_target_ms=100, queue_limit=64, commit="none", disk_budget=64 << 20)
    rng = random.Random(17)
    plans = [
        (f"a{rng.randrange(AGENTS)}", f"{rng.randrange(9)} {LONG[: rng.randrange(60)]}", rng.random(), rng.randrange(1, 16))
        for _ in range(REQUESTS)
    ]  # fmt: skip
    process, ends = psutil.Process(), {"stop": 0, "length": 0, "cancelled": 0, "refused": 0}

    def request(plan: tuple[str, str, float, int]) -> str:
        agent, text, chance, tokens = plan
        try:
            running = Running(runtime, ask(agent, text, max_tokens=tokens, session=f"s{int(chance * 1e6)}"))
        except Overloaded:
            return "refused"
        if chance < 0.15:
            running._over.wait(chance / 10)
            running.ticket.cancel()
        assert running._over.wait(120), "a request hangs"
        last = running.events[-1]
        assert isinstance(last, Finished), last
        return last.finish_reason

    with ThreadPoolExecutor(CLIENTS) as clients:
        first = REQUESTS // 5
        for kind in clients.map(request, plans[:first]):
            ends[kind] += 1
        runtime._call(lambda: None)
        rss, active = process.memory_info().rss, mx.get_active_memory()
        for kind in clients.map(request, plans[first:]):
            ends[kind] += 1
    print(f"{ends}, RSS {rss >> 20} -> {process.memory_info().rss >> 20} MiB")
    assert sum(ends.values()) == REQUESTS
    assert ends["refused"] == 0
    assert ends["cancelled"] > 0
    runtime._call(runtime._pool.check)
    assert runtime._call(lambda: runtime._pool.tails.used) == 0
    health = runtime.health()
    assert (health["active"], health["waiting"]) == (0, 0)
    assert process.memory_info().rss < rss + GROWTH
    assert mx.get_active_memory() < active + (1 << 20)
    runtime.close()
