"""A start on a disk without room: it says so, changes nothing, and once there is room everything is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmem.errors import StoreError
from tests.crash.daemon import READY, Daemon, log_of, spawn
from tests.crash.home import fill
from tests.crash.speaker import said
from tests.runtime.agents import cached, memory, open_runtime, turn
from tests.tiny_model import save_model

FULL = "the disk is full; make room and start again"


def stopped(home: Path) -> None:
    runtime = open_runtime(home, disk_floor=0)
    for n in range(2):
        turn(runtime, "ada", said(n))
    runtime.close()


def killed(home: Path) -> None:
    """With a write-ahead log that nobody folded."""
    runtime = open_runtime(home, disk_floor=0)
    for n in range(2):
        turn(runtime, "ada", said(n))
    runtime._store.flush()
    copy = shutil.copytree(home, home.with_name("copy"))
    runtime.close()
    shutil.rmtree(home)
    copy.rename(home)


def damaged(home: Path) -> None:
    stopped(home)
    with (home / "store" / "index.sqlite").open("r+b") as file:
        file.write(b"damaged")


def content(home: Path) -> dict[Path, bytes]:
    """What must not change: everything but SQLite's own scratch files."""
    files = [p for p in home.rglob("*") if p.is_file() and not p.name.endswith("-shm")]
    return {p: p.read_bytes() for p in files}


def has_all(home: Path) -> None:
    """A start with room: every turn is there, and the state of it."""
    runtime = open_runtime(home, disk_floor=0)
    assert [(a["agent"], a["turns"], a["state"]) for a in runtime.agents()] == [("ada", 2, "warm")]
    reply = turn(runtime, "ada", said(2))
    assert memory(reply)["committed"]
    assert cached(reply) > 100
    assert runtime.upkeep.verify(deep=True)["ok"]
    runtime.close()


@pytest.mark.parametrize(
    "before", [pytest.param(stopped, marks=pytest.mark.slow), damaged], ids=["stopped", "damaged"]
)
def test_a_start_that_needs_room_is_refused_and_changes_nothing(
    small_disk: Path, before: Callable[[Path], None]
) -> None:
    home = small_disk / "home"
    before(home)
    ballast = fill(small_disk)
    there = content(home)
    with pytest.raises(StoreError, match=FULL):
        open_runtime(home, disk_floor=0)
    assert {p: c for p, c in content(home).items() if p in there} == there
    ballast.unlink()
    has_all(home)


@pytest.mark.slow
def test_a_first_start_without_room_leaves_nothing_in_the_way(small_disk: Path) -> None:
    home = small_disk / "home"
    ballast = fill(small_disk)
    with pytest.raises(StoreError, match=FULL):
        open_runtime(home, disk_floor=0)
    assert list((home / "models").rglob("*.*")) == []
    ballast.unlink()
    stopped(home)
    has_all(home)


def test_after_a_kill_it_serves_and_says_that_nothing_is_committed(small_disk: Path) -> None:
    home = small_disk / "home"
    killed(home)
    ballast = fill(small_disk)
    runtime = open_runtime(home, disk_floor=0)
    reply = turn(runtime, "ada", said(2))
    assert cached(reply) > 100
    assert not memory(reply)["committed"]
    assert runtime.health()["status"] == "degraded"
    runtime.close()
    ballast.unlink()
    has_all(home)


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["new", "used"])
def test_the_daemon_says_it_in_one_line(small_disk: Path, tmp_path: Path, first: bool) -> None:
    model, home = save_model(tmp_path / "model"), small_disk  # its log lies beside it
    if not first:
        daemon = Daemon(home, model, "--disk-floor", "0")
        assert daemon.chat("ada", said(0))["agentmem"]["committed"]
        assert daemon.stop() == 0
    log = log_of(home)
    log.write_text("")
    ballast = fill(small_disk)
    refused = spawn(home, model, "--disk-floor", "0")
    told, _ = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert READY not in told
    assert log.read_text().splitlines()[-1].startswith("agentmem: ")
    assert log.read_text().endswith(f"{FULL}\n")
    assert "Traceback" not in log.read_text()
    ballast.unlink()
    daemon = Daemon(home, model, "--disk-floor", "0")
    assert [a["turns"] for a in daemon.get("/v1/agents")["data"]] == ([] if first else [1])
    assert daemon.chat("ada", said(1))["agentmem"]["committed"]
    assert daemon.stop() == 0
