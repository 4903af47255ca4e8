"""SIGKILL at random moments: the daemon starts again, and every acknowledged turn is there."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from agentmem.blockpool.index import Index
from tests.crash.daemon import Daemon, spawn
from tests.engine.layouts import LAYOUTS
from tests.tiny_model import save_model

AGENTS = ("ada", "bob", "cleo")
KILLS = 10
WORDS = ["oil", "lamp", "tide", "ledger", "winter", "bread", "seed", "wheel"]


@dataclass
class Known:
    """What an agent was told: turns, and tokens of the last one (prompt and reply)."""

    turns: int = 0
    tokens: int = 0


def speak(daemon: Daemon, agent: str, known: Known, rng: random.Random) -> None:
    """Turn after turn until the daemon dies."""
    while True:
        text = " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 5, 30, 90])))
        try:
            usage = daemon.chat(agent, text, max_tokens=rng.choice([1, 4, 9]))
        except httpx.HTTPError:
            return
        assert usage["agentmem"]["committed"]
        known.turns += 1
        known.tokens = usage["total_tokens"]


def check(daemon: Daemon, agent: str, known: Known) -> None:
    """All that was acknowledged is there, at most one turn more, and the conversation goes on."""
    if known.turns:
        info = daemon.get(f"/v1/agents/{agent}")
        assert known.turns <= info["turns"] <= known.turns + 1
        if info["turns"] == known.turns:
            assert info["tokens"] == known.tokens
        assert info["tokens"] >= known.tokens
    usage = daemon.chat(agent, "and?")
    # The end-of-turn token that a reply may end with was sampled last and has no state yet.
    assert usage["prompt_tokens_details"]["cached_tokens"] >= known.tokens - 1
    assert usage["agentmem"]["prefilled_tokens"] < 60
    known.turns, known.tokens = daemon.get(f"/v1/agents/{agent}")["turns"], usage["total_tokens"]


@pytest.mark.slow(minutes=2)
def test_ten_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(2)
    model, home = save_model(tmp_path / "model"), tmp_path / "home"
    known = {name: Known() for name in AGENTS}
    for _ in range(KILLS):
        daemon = Daemon(home, model)
        for name in AGENTS:
            check(daemon, name, known[name])
        threads = [
            threading.Thread(target=speak, args=(daemon, name, known[name], random.Random(rng.random())))
            for name in AGENTS
        ]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.05, 1.5))
        daemon.kill()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
    daemon = Daemon(home, model)
    for name in AGENTS:
        check(daemon, name, known[name])
    assert daemon.get("/health")["status"] == "ok"
    disk = daemon.get("/v1/store")["disk"]
    assert disk["quarantined"] == 0
    assert daemon.stop() == 0
    assert sum(k.turns for k in known.values()) > 3 * KILLS, "hardly anything was under way"
    on_disk = {p.name for p in (home / "store" / "extents").iterdir()}
    index = Index(home / "store" / "index.sqlite", "any")
    assert on_disk == {e.name for e in index.extents()}
    index.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_kills_in_the_middle_of_turns_on_every_kind_of_layer(tmp_path: Path, kind: str) -> None:
    """A reply after a kill is that of a home where nobody was killed; what was acknowledged is there."""
    architecture, overrides = LAYOUTS[kind]
    model, rng = save_model(tmp_path / "model", architecture, **overrides), random.Random(kind)
    texts = [" ".join(rng.choice(WORDS) for _ in range(n)) for n in (90, 5, 40)]
    calm = Daemon(tmp_path / "calm", model)
    want = [calm.say("ada", text) for text in texts]
    assert calm.stop() == 0
    home, got, bob = tmp_path / "home", [], Known()
    for text in texts:
        daemon = Daemon(home, model)
        got.append(daemon.say("ada", text))  # alone: beside a reply, the time decides where a prompt is cut
        other = threading.Thread(target=speak, args=(daemon, "bob", bob, random.Random(rng.random())))
        other.start()
        time.sleep(rng.uniform(0.05, 0.5))
        daemon.kill()
        other.join(timeout=60)
        assert not other.is_alive()
        daemon = Daemon(home, model)
        check(daemon, "bob", bob)
        assert daemon.stop() == 0
    assert [reply for reply, _ in got] == [reply for reply, _ in want]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for _, usage in got]
    assert cached == [usage["prompt_tokens_details"]["cached_tokens"] for _, usage in want]


@pytest.mark.slow
def test_starts_that_are_killed_do_not_stand_in_the_way_of_the_next(tmp_path: Path) -> None:
    model, home = save_model(tmp_path / "model"), tmp_path / "home"
    daemon = Daemon(home, model)
    usage = daemon.chat("ada", "hello")
    daemon.kill()
    for seconds in (0.3, 0.8, 1.2, 1.6, 2.0, 2.5):
        starting = spawn(home, model)
        time.sleep(seconds)
        starting.kill()
        starting.wait(timeout=60)
    last = Daemon(home, model)
    check(last, "ada", Known(1, usage["total_tokens"]))
    assert last.stop() == 0
