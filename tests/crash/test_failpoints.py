"""SIGKILL at every named point of the store's work: what was acknowledged is there, and answers are those of a home that
nothing happened to."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem.blockpool.failpoint import FAILPOINTS, arm
from tests.crash.driver import AGENTS, Driver, Round

ROOT = Path(__file__).resolve().parents[2]
# What a life does so that it comes to a point, by the beginning of the point's name.
WAYS = {
    "file": ["speak"] * 6,
    "index": ["speak"] * 6,
    "commit": ["speak"] * 8,
    "drop": ["speak", "speak", "forget"] * 3,
    "unlink": ["speak", "speak", "forget"] * 3,
    "forget": ["speak", "speak", "forget"] * 3,
    "compact": ["speak_long"] * 4,
    "evict": ["speak", "speak", "drop"] * 4,
    "quarantine": ["speak", "damage"] * 4,
    "close": ["speak"],
    "salvage": ["speak"],
}


class Homes:
    """One home that lives on from round to round."""

    def __init__(self, folder: Path, driver: Driver, reference: dict[str, list[str]], seed: int) -> None:
        self.home, self.journal = folder / "home", folder / "journal"
        self.driver, self.reference = driver, reference
        self.rng = random.Random(seed)
        self.allowed: dict[str, list[int]] = {agent: [0] for agent in AGENTS}
        self.lossy: list[str] = []
        self.killed: Counter[str] = Counter()
        self.rounds = 0

    def round(self, point: str, n: int) -> None:
        """Live once, with `point` armed for its n-th pass."""
        self.journal.write_text("")
        if point.startswith("salvage"):
            self._break_index()
        actions = list(WAYS[point.partition(".")[0]]) if point else []
        seed, armed = self.rng.randrange(1 << 30), f"{point}:{n}" if point else ""
        life = Round(
            str(self.home), str(self.journal), self.reference, self.allowed, seed, armed, actions, self.lossy
        )
        status = self.driver.live(life)
        assert status in (0, -signal.SIGKILL), self.driver.errors.read_text()[-4000:]
        self.rounds += 1
        self.killed[point] += status != 0
        self._take_notes()

    def _take_notes(self) -> None:
        """What each agent may have after this life: what was noted, or one step more."""
        for line in self.journal.read_text().splitlines():
            note = json.loads(line)
            if "found" in note:
                self.allowed = {agent: [turns, turns + 1] for agent, turns in note["found"].items()}
            elif "lossy" in note:
                self.lossy = note["lossy"]
            elif "forgetting" in note:
                self.allowed[note["agent"]].append(0)
            else:
                self.allowed[note["agent"]] = [note["turns"], note["turns"] + 1]
                if note["turns"] == 0:
                    self.lossy = [agent for agent in self.lossy if agent != note["agent"]]

    def _break_index(self) -> None:
        path = self.home / "store" / "index.sqlite"
        if path.exists():
            with path.open("r+b") as file:
                file.write(b"damaged")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("driver") / "errors")
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def few_replies(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return driver.reference(tmp_path_factory.mktemp("reference"), turns=5)


def kill_at(homes: Homes, point: str, times: int) -> None:
    """Rounds until the process was killed at `point` so often."""
    for passes in (homes.rng.randint(1, 4), homes.rng.randint(1, 2), 1, 1):
        homes.round(point, passes)
        if homes.killed[point] == times:
            return
    raise AssertionError(f"four lives did not come to {point}")


QUICK = ("index.changed", "salvage.aside")


@pytest.mark.parametrize("point", QUICK)
def test_a_kill_at_a_failpoint_loses_nothing(
    tmp_path: Path, driver: Driver, few_replies: dict[str, list[str]], point: str
) -> None:
    homes = Homes(tmp_path, driver, few_replies, seed=1)
    if point.startswith("salvage"):
        homes.round("commit.done", 5)
    kill_at(homes, point, 1)
    homes.round("", 0)


@pytest.mark.slow(minutes=1)
def test_kills_at_all_failpoints_lose_nothing(
    tmp_path: Path, driver: Driver, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reference = driver.reference(tmp_path_factory.mktemp("reference"), turns=16)
    homes = Homes(tmp_path, driver, reference, seed=2)
    points = [p for p in FAILPOINTS for _ in range(4)]
    homes.rng.shuffle(points)
    for point in points:
        kill_at(homes, point, homes.killed[point] + 1)
    homes.round("", 0)
    kills = sum(homes.killed.values())
    print(f"{homes.rounds} rounds, {kills} kills at {len(FAILPOINTS)} failpoints")
    assert set(homes.killed) - {""} == set(FAILPOINTS)
    assert kills >= 100


@pytest.mark.slow
def test_the_environment_arms_a_failpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.crash.speaker", str(tmp_path / "home"), "4"]
    deadly = {**os.environ, "AGENTMEM_FAILPOINT": "index.committed:3"}
    killed = subprocess.run(command, cwd=ROOT, env=deadly, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    acknowledged = len(killed.stdout.splitlines()) - 1
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    first = json.loads(again.stdout.splitlines()[1])["n"]
    assert acknowledged <= first <= acknowledged + 1
    assert acknowledged >= 1


def test_every_failpoint_is_somewhere_in_the_code() -> None:
    sources = "".join(p.read_text() for p in (ROOT / "blockpool").glob("*.py"))
    assert set(re.findall(r'failpoint\("([a-z.]+)"\)', sources)) == set(FAILPOINTS)


def test_a_failpoint_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no failpoint 'file\.nowhere'"):
        arm("file.nowhere:1")
