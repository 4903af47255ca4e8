"""RAM budget and bytes on disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agentmem.engine.request import ChatRequest
from agentmem.errors import ContextOverflow
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.engine import round_robin
from tests.engine.turns import say, words

ROOT = Path(__file__).resolve().parents[2]
AGENTS, TURNS = 10, 50
ALLOWANCE = 8 << 20
"""Bytes that a process may hold beyond the RAM budget: index, token logs, what writes and restores leave behind."""


def visit(runtime: Runtime, observe) -> list[str]:
    """Fifty turns, round-robin over ten agents; returns the replies."""
    rng = random.Random(5)
    histories = [[{"role": "system", "content": f"Agent {a}: {words(rng, 120)}"}] for a in range(AGENTS)]
    replies = []
    for n in range(TURNS):
        history = histories[n % AGENTS]
        history.append({"role": "user", "content": words(rng, 6)})
        turn = say(runtime, ChatRequest(f"agent-{n % AGENTS}", history, max_tokens=8))
        history.append({"role": "assistant", "content": turn.text})
        replies.append(turn.text)
        observe(turn)
    return replies


@pytest.mark.slow
def test_ten_agents_in_a_fifth_of_their_state(tmp_path: Path) -> None:
    """Resident state stays within the budget, and every answer is that of the run without a limit."""
    model = random_model("llama", seed=9, num_hidden_layers=4)
    states: list[str] = []
    roomy = Runtime.open(Settings(home=tmp_path / "roomy", ram_budget="64MiB"), lambda: model)
    want = visit(roomy, lambda turn: None)
    need = roomy.store()["ram"]["used_bytes"]
    roomy.close()
    del roomy
    before = mx.get_active_memory()
    budget = need // 5
    tight = Runtime.open(Settings(home=tmp_path / "tight", ram_budget=budget), lambda: model)
    peaks: list[int] = []

    def observe(turn) -> None:
        states.append(turn.memory["state_before"])
        assert tight.store()["ram"]["used_bytes"] <= budget
        peaks.append(mx.get_active_memory() - before)

    got = visit(tight, observe)
    tight.close()
    assert got == want
    assert states.count("warm") >= TURNS - 2 * AGENTS
    tail = 2 * 64 * 4 * 1024 * 4
    assert max(peaks) <= budget + tail


@pytest.mark.slow(minutes=1)
def test_memory_of_the_process_follows_the_budget(tmp_path: Path) -> None:
    """The same with large state, in processes of their own: what they hold beyond the budget is next to nothing."""
    roomy = measured(tmp_path / "roomy", 256 << 20)
    state = roomy["used"]
    assert state >= 150_000_000
    budget = state // 5
    tight = measured(tmp_path / "tight", budget)
    assert tight["replies"] == roomy["replies"]
    assert tight["states"].count("warm") == round_robin.TURNS - round_robin.AGENTS
    assert tight["active"] <= budget + ALLOWANCE
    assert abs(tight["active"] - tight["capacity"]) <= 0.05 * tight["capacity"] + ALLOWANCE
    assert tight["rss"] <= budget + ALLOWANCE
    assert roomy["rss"] >= state > 4 * tight["rss"]


@pytest.mark.slow(minutes=2)
def test_a_hundred_agents_on_a_budget_for_ten(tmp_path: Path) -> None:
    """Five hundred turns: memory and disk stay within their budgets, and nothing fails. State that left the disk is read anew."""
    budget, disk = 128 << 20, 420 << 20
    result = measured(tmp_path, budget, 100, 500, disk)
    assert len(result["replies"]) == 500
    assert result["used"] <= budget
    assert result["rss"] <= 1.1 * budget
    assert budget < result["on_disk"] <= disk
    assert result["states"].count("warm") > 100


def measured(home: Path, *options: int) -> dict[str, Any]:
    """Agents visited round-robin by a process whose allocator gives back at once what is freed."""
    command = [sys.executable, "-m", "tests.engine.round_robin", str(home), *map(str, options)]
    eager = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, env=os.environ | eager, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_what_can_never_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """A request beyond the RAM budget or the context gets a 400 that says so; the agent does not come into being."""
    runtime = Runtime.open(
        Settings(home=tmp_path, ram_budget="512KiB"), lambda: random_model("llama", seed=0)
    )
    for message, limit in ((words(random.Random(1), 600), 4), ("hi", 5000), ("hi", 1_000_000)):
        with pytest.raises(ContextOverflow, match="tokens"):
            say(runtime, ChatRequest("big", [{"role": "user", "content": message}], max_tokens=limit))
    assert runtime.agents() == []
    assert runtime.store()["ram"]["used_bytes"] == 0
    runtime.close()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama"])
def test_bytes_on_disk(tmp_path: Path, architecture: str) -> None:
    """Bytes of a committed turn against fp16 KV, everything included, and what one more turn adds."""
    model = random_model(architecture, seed=0, num_hidden_layers=16)
    runtime = Runtime.open(Settings(home=tmp_path, ram_budget="96MiB"), lambda: model)
    fp16_row = runtime.store()["row_bytes"]["fp16"]
    first = 0
    for tokens, bound in ((1024, 0.37), (4096, 0.31)):
        agent = f"a{tokens}"
        text = agent[-1] * (tokens - 20)
        before = _du(tmp_path / "store")
        messages = [{"role": "user", "content": text}]
        turn = say(runtime, ChatRequest(agent, messages, max_tokens=4))
        held = turn.usage["total_tokens"]
        assert tokens <= held < tokens + 20
        info = runtime.agent(agent)
        assert info["disk_bytes"] / info["fp16_bytes"] <= bound
        assert (_du(tmp_path / "store") - before) / (held * fp16_row) <= bound
        first = first or held
    row = runtime.store()["row_bytes"]
    assert row["packed"] / row["fp16"] <= 4.7 / 16
    for n in range(8):
        messages += [
            {"role": "assistant", "content": turn.text},
            {"role": "user", "content": "y" * (3 + 11 * n)},
        ]
        turn = say(runtime, ChatRequest(agent, messages, max_tokens=4))
        new = turn.memory["prefilled_tokens"] + turn.usage["completion_tokens"]
        assert turn.memory["bytes_written"] <= 1.2 * new * fp16_row + (24 << 10)
    runtime.close()
    held = first + turn.usage["total_tokens"]
    assert _du(tmp_path / "store") / (held * fp16_row) <= 0.33


def _du(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_eviction_frees_and_fills_ten_times_the_budget(tmp_path: Path) -> None:
    """Agents whose state is ten times the budget go through; the arena never grows."""
    model = random_model("llama", seed=2)
    runtime = Runtime.open(Settings(home=tmp_path, ram_budget="1MiB"), lambda: model)
    capacity = runtime.store()["ram"]["capacity_bytes"]
    rng = np.random.default_rng(0)
    fp16 = 0
    for n in range(28):
        text = bytes(rng.integers(97, 122, 1300).astype(np.uint8)).decode()
        say(runtime, ChatRequest(f"n{n}", [{"role": "user", "content": text}], max_tokens=2))
        assert runtime.store()["ram"]["used_bytes"] <= capacity
        fp16 += runtime.agent(f"n{n}")["fp16_bytes"]
    assert fp16 * 0.28125 >= 10 * capacity
    assert runtime.store()["ram"]["capacity_bytes"] == capacity
    runtime.close()
