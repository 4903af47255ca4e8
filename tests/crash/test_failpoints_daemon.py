"""SIGKILL of the real daemon at named points, while clients speak to it over HTTP.

Half of the points; `AGENTMEM_FAILPOINTS=all` takes all of them.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest

from agentmem.blockpool.failpoint import FAILPOINTS
from tests.crash.daemon import Daemon, spawn
from tests.tiny_model import save_model

ALL = os.environ.get("AGENTMEM_FAILPOINTS") == "all"
AGENTS = ("ada", "bob")
MOST_TURNS = 14
FLAGS = ("--disk-floor", "0", "--itl-target-ms", "1000000", "--scrub-mb-s", "0")
# What clients do until the daemon dies, by the beginning of the point's name.
WAYS = {
    "drop": ("speak", "speak", "forget"),
    "unlink": ("speak", "speak", "forget"),
    "forget": ("speak", "forget"),
    "evict": ("speak", "speak", "prune"),
    "quarantine": ("speak", "damage", "speak"),
    "close": ("speak", "stop"),
}
SPEAK = ("speak",)


def said(agent: str, n: int) -> str:
    rng = random.Random(f"{agent} {n}")
    return " ".join(
        rng.choice(("oil", "lamp", "tide", "ledger", "bread")) for _ in range(rng.choice((1, 9, 40)))
    )


class Clients:
    """What they know of one home: turns that were acknowledged, and those that may be there after a kill."""

    def __init__(self, home: Path, model: Path, seed: int) -> None:
        self.home, self.model, self.rng = home, model, random.Random(seed)
        self.allowed: dict[str, set[int]] = {agent: {0} for agent in AGENTS}
        self.lossy: set[str] = set()
        self.reference: dict[str, list[str]] = {}
        self.killed: Counter[str] = Counter()

    def make_reference(self, home: Path) -> None:
        """The replies of a home that nothing happens to."""
        daemon = Daemon(home, self.model, *FLAGS)
        for agent in AGENTS:
            self.reference[agent] = [daemon.say(agent, said(agent, n))[0] for n in range(MOST_TURNS)]
        assert daemon.stop() == 0

    def look(self, daemon: Daemon) -> None:
        """All that was acknowledged is there."""
        known = {a["agent"]: a["turns"] for a in daemon.get("/v1/agents")["data"]}
        for agent in AGENTS:
            turns = known.get(agent, 0)
            assert turns in self.allowed[agent], (agent, turns, self.allowed[agent])
            self.allowed[agent] = {turns}
        if not self.lossy:
            assert daemon.post("/v1/store/verify", {"deep": True})["ok"]
            assert daemon.get("/v1/store")["disk"]["quarantined"] == 0

    def live(self, point: str) -> None:
        """Start with `point` armed, look, and act until it kills the daemon."""
        armed = (
            f"{point}:{self.rng.randint(1, 2)}" if point.startswith(("file", "index", "commit")) else point
        )
        if point.startswith("salvage"):
            with (self.home / "store" / "index.sqlite").open("r+b") as file:
                file.write(b"damaged")
            starting = spawn(self.home, self.model, *FLAGS, failpoint=armed)
            assert starting.wait(timeout=60) == -signal.SIGKILL
            self.recover()
        else:
            daemon = Daemon(self.home, self.model, *FLAGS, failpoint=armed)
            self.look(daemon)
            self.act(daemon, WAYS.get(point.partition(".")[0], SPEAK))
            assert daemon.process.wait(timeout=60) == -signal.SIGKILL, f"{point} was not passed"
            daemon.http.close()
        self.killed[point] += 1

    def recover(self) -> None:
        """What a rebuild left unfinished is finished by the next start."""
        daemon = Daemon(self.home, self.model, *FLAGS)
        self.look(daemon)
        assert daemon.stop() == 0

    def act(self, daemon: Daemon, ways: tuple[str, ...]) -> None:
        try:
            for i in range(60):
                getattr(self, ways[i % len(ways)])(daemon, AGENTS[i // len(ways) % len(AGENTS)])
        except httpx.HTTPError:
            return

    def speak(self, daemon: Daemon, agent: str) -> None:
        (turns,) = self.allowed[agent]
        if turns == MOST_TURNS:
            self.forget(daemon, agent)
            turns = 0
        self.allowed[agent] = {turns, turns + 1}
        reply, usage = daemon.say(agent, said(agent, turns))
        assert usage["agentmem"]["committed"]
        self.allowed[agent] = {turns + 1}
        if agent not in self.lossy:
            assert reply == self.reference[agent][turns], (agent, turns)

    def forget(self, daemon: Daemon, agent: str) -> None:
        (turns,) = self.allowed[agent]
        if turns:
            self.allowed[agent] = {turns, 0}
            assert daemon.http.delete(f"/v1/agents/{agent}").status_code == 200
            self.allowed[agent] = {0}
        self.lossy.discard(agent)

    def prune(self, daemon: Daemon, agent: str) -> None:
        """State that is computed anew lies in other pages than it did; replies may be others."""
        self.lossy |= set(AGENTS)
        daemon.post("/v1/store/prune", {"older_s": 0})

    def damage(self, daemon: Daemon, agent: str) -> None:
        self.lossy |= set(AGENTS)
        for path in (self.home / "store" / "extents").iterdir():
            content = bytearray(path.read_bytes())
            content[-9] ^= 8
            path.write_bytes(content)
        for name in AGENTS:
            if self.allowed[name] != {0}:
                daemon.post(f"/v1/agents/{name}/evict", {})

    def stop(self, daemon: Daemon, agent: str) -> None:
        daemon.stop()
        raise httpx.CloseError("the daemon ends")


@pytest.mark.slow(minutes=2)
def test_the_daemon_killed_at_half_of_the_failpoints_loses_nothing(tmp_path: Path) -> None:
    clients = Clients(tmp_path / "home", save_model(tmp_path / "model"), seed=3)
    clients.make_reference(tmp_path / "undisturbed")
    points = clients.rng.sample(FAILPOINTS, len(FAILPOINTS) // (1 if ALL else 2))
    for point in points:
        clients.live(point)
    last = Daemon(clients.home, clients.model, *FLAGS)
    clients.look(last)
    for agent in AGENTS * 2:
        clients.forget(last, agent)
        clients.speak(last, agent)
    assert last.stop() == 0
    assert set(clients.killed) == set(points)
    print(f"{sum(clients.killed.values())} kills of the daemon at {len(points)} failpoints")
