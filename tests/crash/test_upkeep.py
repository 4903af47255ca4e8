"""Verify, repair and scrub: damage is found, put aside, and costs nobody an answer."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmem.blockpool.files import Files
from agentmem.blockpool.scrub import Scrub
from agentmem.blockpool.shelf import Shelf
from agentmem.blockpool.verify import purge, verify
from tests.crash.home import TURNS, Expected, ask_all, go_on, start
from tests.runtime.agents import extents, quarantined, turn


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def largest(home: Path) -> Path:
    return max(extents(home), key=lambda p: p.stat().st_size)


def program(home: Path, *flags: str) -> dict[str, Any]:
    """What the look-over of a store that nobody holds prints."""
    command = [sys.executable, "-m", "agentmem.blockpool.verify", str(home / "store"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_what_nobody_touched_is_in_order(home: Path) -> None:
    before = {p: p.read_bytes() for p in (home / "store").rglob("*") if p.is_file()}
    quick, deep = verify(home / "store", deep=False), verify(home / "store", deep=True)
    assert quick.ok
    assert deep.ok
    assert quick.extents == deep.extents == len(extents(home))
    assert quick.bytes == 0
    assert 0.8 * sum(p.stat().st_size for p in extents(home)) < deep.bytes
    assert deep.rows > 50
    assert {p: p.read_bytes() for p in before} == before


def test_damage_to_a_header_is_found_without_reading_all(home: Path) -> None:
    flip(largest(home), 40)
    report = verify(home / "store", deep=False)
    assert list(report.bad) == [largest(home).name]
    assert not report.ok


def test_damage_to_rows_is_found_by_reading_all(home: Path) -> None:
    flip(largest(home), -5)
    assert verify(home / "store", deep=False).ok
    report = verify(home / "store", deep=True)
    assert list(report.bad) == [largest(home).name]
    assert "checksum" in report.bad[largest(home).name]


def test_missing_and_unknown_files_are_told(home: Path) -> None:
    gone = largest(home)
    gone.unlink()
    stranger = home / "store" / "extents" / ("0" * 64 + ".safetensors")
    stranger.write_bytes(b"?")
    report = verify(home / "store", deep=False)
    assert (report.missing, report.orphans, report.ok) == ([gone.name], [stranger.name], False)


@pytest.mark.parametrize(
    "change",
    [
        "update pages set tokens = zeroblob(length(tokens)) where id = 2",
        "update copies set data = zeroblob(9) where n = 1",
        "update agents set last_used = 5",
        "delete from pages where id = 1",
    ],
)
def test_damage_to_the_index_is_found(home: Path, change: str) -> None:
    connection = sqlite3.connect(home / "store" / "index.sqlite")
    connection.execute("pragma foreign_keys=off")
    connection.execute(change)
    connection.commit()
    connection.close()
    report = verify(home / "store", deep=False)
    assert report.index
    assert not report.ok


def test_tokens_that_are_not_those_of_the_extent_are_found(home: Path) -> None:
    """Rows with right sums, in the wrong place."""
    connection = sqlite3.connect(home / "store" / "index.sqlite")
    from agentmem.blockpool.rows import piece_sum

    row = connection.execute("select * from pieces where extent_row > 0 limit 1").fetchone()
    page, page_row, extent, raw, extent_row, rows, _ = row
    moved = (page, page_row, extent, raw, extent_row - 1, rows)
    connection.execute(
        "update pieces set extent_row = ?, sum = ? where page = ? and page_row = ?",
        (extent_row - 1, piece_sum(*moved), page, page_row),
    )
    connection.commit()
    connection.close()
    assert verify(home / "store", deep=False).ok
    report = verify(home / "store", deep=True)
    assert list(report.bad.values()) == ["its tokens are not those of the index"]


def test_a_running_daemon_verifies_and_repairs(home: Path, expected: Expected) -> None:
    runtime = start(home)
    assert runtime.upkeep.verify(deep=True)["ok"]
    bad = largest(home)
    flip(bad, -5)
    report = runtime.upkeep.verify(deep=True)
    assert list(report["bad"]) == [bad.name]
    assert bad.exists()
    repaired = runtime.upkeep.repair()
    assert repaired["quarantined"] == 1
    assert quarantined(home) == [bad.name]
    assert runtime.store()["disk"]["quarantined"] == 1
    assert runtime.upkeep.verify(deep=True)["ok"]
    replies = {agent: reply.text for agent, reply in go_on(runtime).items()}
    assert replies == expected.replies
    emptied = runtime.upkeep.repair(purge_quarantine=True)
    assert emptied["purged_bytes"] > 1000
    assert quarantined(home) == []
    runtime.close()


@pytest.mark.slow
def test_verifying_while_agents_speak_finds_nothing(home: Path) -> None:
    runtime = start(home)
    reports: list[dict[str, Any]] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            reports.append(runtime.upkeep.verify(deep=True))

    thread = threading.Thread(target=look)
    thread.start()
    for n in range(12):
        turn(runtime, "ada", f"line {n} and some words more")
    over.set()
    thread.join(timeout=60)
    runtime.close()
    assert reports
    assert all(r["ok"] for r in reports), [r for r in reports if not r["ok"]]


def test_a_rebuild_is_done_by_the_next_start(home: Path, expected: Expected) -> None:
    runtime = start(home)
    assert runtime.upkeep.verify(rebuild=True)["rebuild"] == "at the next start"
    runtime.close()
    assert ask_all(home) == expected
    assert "index.sqlite" in quarantined(home)
    start(home).close()
    assert quarantined(home).count("index.sqlite") == 1


@pytest.mark.parametrize(
    "flags",
    [("--rebuild",), *(pytest.param(f, marks=pytest.mark.slow) for f in [("--deep",), ("--repair",)])],
)
def test_the_program_on_a_sound_store(home: Path, expected: Expected, flags: tuple[str, ...]) -> None:
    report = program(home, *flags)
    assert report["ok"]
    assert bool(report.get("rebuilt")) == ("--rebuild" in flags)
    assert ask_all(home) == expected


@pytest.mark.slow
def test_the_program_mends_a_damaged_store(home: Path, expected: Expected) -> None:
    bad = largest(home)
    flip(bad, -5)
    flip(home / "store" / "index.sqlite", 5000)
    report = program(home, "--repair")
    assert not report["ok"]
    assert report["rebuilt"]["turns"] == sum(len(t) for t in TURNS.values())
    assert bad.name in quarantined(home)
    assert program(home, "--deep")["ok"]
    assert ask_all(home).replies == expected.replies


def test_the_program_on_a_home_without_a_store(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    report = program(tmp_path, "--deep", "--purge")
    assert (report["ok"], report["extents"], report["purged_bytes"]) == (True, 0, 0)
    assert os.listdir(tmp_path / "store") == []


def test_purge_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"kept")
    (tmp_path / "store" / "quarantine").mkdir(parents=True)
    (tmp_path / "store" / "quarantine" / "link").symlink_to(precious)
    purge(tmp_path / "store")
    assert (precious / "file").read_bytes() == b"kept"
    assert os.listdir(tmp_path / "store" / "quarantine") == []


def scrubbed(
    home: Path, idle: Callable[[], bool] = lambda: True, rate: float = 1e9
) -> tuple[Scrub, list[dict[int, str]], Shelf]:
    shelf = Shelf(home / "store", Files(durable=False))
    for i, path in enumerate(extents(home)):
        shelf.names[i] = path.name
    found: list[dict[int, str]] = []
    return Scrub(shelf, rate, idle, found.append, first=0.0), found, shelf


def wait_for(what: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(600):
        if what():
            return
        pause.wait(0.05)
    raise AssertionError("it never came to that")


def test_the_scrub_reads_everything_and_finds_damage(home: Path) -> None:
    bad = largest(home)
    flip(bad, -5)
    scrub, found, shelf = scrubbed(home)
    scrub.start()
    wait_for(lambda: scrub.passes == 1)
    scrub.stop()
    ((extent, reason),) = [item for bad_ones in found for item in bad_ones.items()]
    assert shelf.names[extent] == bad.name
    assert "checksum" in reason
    assert scrub.status()["bad"] == 1
    assert scrub.extents == len(extents(home)) - 1


def test_the_scrub_waits_while_the_engine_is_busy(home: Path) -> None:
    busy = threading.Event()
    busy.set()
    scrub, found, _ = scrubbed(home, idle=lambda: not busy.is_set())
    scrub.start()
    wait_for(lambda: scrub.bytes > 0)
    read = scrub.bytes
    assert scrub.extents == 0
    busy.clear()
    wait_for(lambda: scrub.passes == 1)
    scrub.stop()
    assert read < scrub.bytes
    assert found == []


def test_the_scrub_can_be_switched_off(home: Path) -> None:
    scrub, _, _ = scrubbed(home, rate=0.0)
    scrub.start()
    scrub.stop()
    assert scrub.status() == {"bytes_per_s": 0.0, "bytes": 0, "extents": 0, "passes": 0, "bad": 0}


def test_what_the_scrub_finds_is_put_aside(home: Path, expected: Expected) -> None:
    bad = largest(home)
    flip(bad, -5)
    runtime = start(home)
    scrub = runtime._store.scrub
    assert scrub is not None
    scrub._check(next(i for i, name in runtime._store.names.items() if name == bad.name))
    wait_for(lambda: quarantined(home) == [bad.name])
    assert {agent: reply.text for agent, reply in go_on(runtime).items()} == expected.replies
    assert "quarantined" in {runtime.explain(agent)["reason"] for agent in TURNS}
    assert runtime.health()["store"]["scrub"]["bad"] == 1
    runtime.close()
