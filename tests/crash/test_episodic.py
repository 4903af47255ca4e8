"""SIGKILL of the daemon while an agent's memory is folded: at every point of it, and at the writes that it causes."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest

from agentmem.blockpool.failpoint import FOLDING
from tests.crash.daemon import Daemon
from tests.tiny_model import save_model

AGENT = "ada"
FLAGS = (
    "--disk-floor",
    "0",
    "--itl-target-ms",
    "1000000",
    "--scrub-mb-s",
    "0",
    "--episode-encoder",
    "hash512",
)
POLICY = {"kind": "episodic", "budget_tokens": 256, "block_tokens": 256, "episodes": 2}
WRITES = (
    "file.written",
    "file.renamed",
    "index.changed",
    "index.committed",
    "commit.done",
    "evict.committed",
)
SUBJECTS = (("oil", "lamp", "wick", "flame", "keeper"), ("tide", "harbour", "boat", "rope", "gull"))


def said(n: int) -> str:
    rng = random.Random(n)
    return " ".join(rng.choice(SUBJECTS[n // 4 % 2]) for _ in range(rng.choice((4, 8, 14))))


def speak_until_it_dies(daemon: Daemon, first: int) -> int:
    """Turns until the daemon is gone; returns how many were acknowledged in all."""
    turns = first
    try:
        for _ in range(60):
            _, usage = daemon.say(AGENT, said(turns))
            assert usage["agentmem"]["committed"]
            turns += 1
    except httpx.HTTPError:
        return turns
    raise AssertionError(f"nothing killed it in turns {first} to {turns}")


@pytest.mark.slow(minutes=1)
def test_kills_while_memory_is_folded_lose_no_turn(tmp_path: Path) -> None:
    home, model, rng = tmp_path / "home", save_model(tmp_path / "model"), random.Random(11)
    daemon = Daemon(home, model, *FLAGS)
    daemon.post("/v1/agents", {"agent": AGENT, "policy": POLICY})
    turns, compressed = 0, 0
    for _ in range(40):
        compressed += daemon.chat(AGENT, said(turns))["agentmem"]["compressed_tokens"]
        turns += 1
    assert compressed
    assert daemon.stop() == 0
    for point in (*FOLDING, *(f"{name}:{rng.randint(2, 4)}" for name in WRITES)):
        daemon = Daemon(home, model, *FLAGS, failpoint=point)
        known = daemon.get(f"/v1/agents/{AGENT}")["turns"]
        assert turns <= known <= turns + 1, point
        turns = speak_until_it_dies(daemon, known)
        assert daemon.process.wait(timeout=60) == -9, point
        daemon.http.close()
    daemon = Daemon(home, model, *FLAGS)
    assert turns <= daemon.get(f"/v1/agents/{AGENT}")["turns"] <= turns + 1
    assert daemon.post("/v1/store/verify", {"deep": True})["ok"]
    usage = daemon.chat(AGENT, "who keeps the lamp?")
    assert usage["prompt_tokens"] - usage["agentmem"]["evicted_tokens"] <= 256 + 4 * 256
    assert daemon.stop() == 0
