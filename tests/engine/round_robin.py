"""Agents visited in turn, in a process of its own whose memory is measured.

`python -m tests.engine.round_robin HOME BUDGET [AGENTS TURNS DISK]` prints one JSON object: replies, the states before the
turns, and bytes. With DISK, the bytes of state that the disk may take, state is narrower.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from agentmem.engine.request import ChatRequest
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.engine.turns import Turn, say, words

AGENTS, TURNS = 10, 20
WARM_UP_TURNS = 2
WIDE = {"num_hidden_layers": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2048}
"""State of 37 kB a token, two megabytes a page: the state of ten agents is much next to all else."""
NARROW = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 1024}
"""A quarter of that, for a hundred agents."""
FORMAT = "q4-plain"
"""Without the default's key maps: of heads this wide they would be larger than the state."""


def visit(
    runtime: Runtime, agents: int, turns: int, reply: int, observe: Callable[[Turn], None], text: int = 32
) -> None:
    """Turns round-robin over the agents, each of which begins with `text` words of its own."""
    rng = random.Random(5)
    histories = [[{"role": "system", "content": f"Agent {a}: {words(rng, text)}"}] for a in range(agents)]
    for n in range(turns):
        history = histories[n % agents]
        history.append({"role": "user", "content": words(rng, 2)})
        turn = say(runtime, ChatRequest(f"agent-{n % agents}", history, max_tokens=reply))
        history.append({"role": "assistant", "content": turn.text})
        observe(turn)


def measure(
    home: Path, budget: int, agents: int = AGENTS, turns_in_all: int = TURNS, disk: int | None = None
) -> dict[str, Any]:
    """One visit. `rss` and `active` are the most that the process and MLX held after a turn, beyond what they held before
    the runtime was opened, when code and weights had been in use already. MLX gives back at once what it frees.
    """
    mx.set_cache_limit(0)
    model = random_model("llama", seed=9, **(WIDE if disk is None else NARROW))
    warm_up = Runtime.open(
        Settings(home=home / "warm-up", ram_budget=64 << 20, kv_format=FORMAT), lambda: model
    )
    visit(warm_up, 1, WARM_UP_TURNS, 1, lambda turn: None)
    warm_up.close()
    del warm_up
    gc.collect()
    mx.clear_cache()

    process, turns, rss, active, on_disk = psutil.Process(), list[Turn](), list[int](), list[int](), [0]

    def sample() -> None:
        rss.append(process.memory_info().rss)
        active.append(mx.get_active_memory())

    def observe(turn: Turn) -> None:
        turns.append(turn)
        sample()
        if len(turns) % 10 == 0:
            on_disk.append(sum(p.stat().st_size for p in (home / "home" / "store").rglob("*") if p.is_file()))

    sample()
    runtime = Runtime.open(
        Settings(home=home / "home", ram_budget=budget, disk_budget=disk, kv_format=FORMAT), lambda: model
    )
    visit(runtime, agents, turns_in_all, 1, observe, 32 if disk is None else 4)
    used, capacity = (runtime.store()["ram"][k] for k in ("used_bytes", "capacity_bytes"))
    runtime.close()
    return {
        "replies": [turn.text for turn in turns],
        "states": [turn.memory["state_before"] for turn in turns],
        "used": used,
        "capacity": capacity,
        "on_disk": max(on_disk),
        "rss": max(rss) - rss[0],
        "active": max(active) - active[0],
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
