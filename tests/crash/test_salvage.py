"""Whatever happens to the index file, the daemon starts, every turn is there, and the state is found again."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmem.blockpool.files import Files
from agentmem.blockpool.salvage import SALVAGED, finish, rebuild
from tests.crash.home import Expected, ask_all, copy_of, start
from tests.runtime.agents import extents, quarantined

pytestmark = pytest.mark.slow

PAGE = 4096


def index(home: Path) -> Path:
    return home / "store" / "index.sqlite"


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def statement(sql: str) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute("pragma foreign_keys=off")
        connection.execute(sql)
        connection.commit()
        connection.close()

    return run


WITH_STATE = {
    "first page gone": lambda p: overwrite(p, 0, os.urandom(PAGE)),
    "magic gone": lambda p: overwrite(p, 0, b"x"),
    "schema altered": lambda p: overwrite(
        p, p.read_bytes().index(b"CREATE TABLE pieces"), b"CREATE TABLE pictes"
    ),
    "version flipped": statement("pragma user_version=66"),
    "a page altered": statement("update pages set tokens = zeroblob(4) where id = 2"),
    "pages gone": statement("delete from pages"),
    "a piece altered": statement("update pieces set extent_row = 1"),
    "agents altered": statement("update agents set last_used = 0"),
    "agents gone": statement("delete from agents"),
    "sessions gone": statement("delete from sessions"),
    "turns altered": statement("update turns set messages = '[]'"),
    "turns gone": statement("delete from turns"),
    "copies gone": statement("delete from copies"),
    "copies altered": statement("update copies set data = zeroblob(40)"),
    "spaces altered": statement("update spaces set fingerprint = 'other'"),
    "table gone": statement("drop table pieces"),
}


QUICK = ("first page gone", "schema altered", "turns altered", "pages gone")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, damage in WITH_STATE.items()
    ],
)
def test_a_damaged_index_costs_nothing(
    home: Path, expected: Expected, damage: Callable[[Path], None]
) -> None:
    before = {p.name for p in extents(home)}
    damage(index(home))
    start(home).close()
    assert before <= {p.name for p in extents(home)}
    assert ask_all(home) == expected


def test_an_intact_index_is_left_alone(home: Path, expected: Expected) -> None:
    assert ask_all(home) == expected
    assert quarantined(home) == []


@pytest.mark.parametrize("size", [0, 3, 5 * PAGE + 17])
def test_an_index_cut_short_keeps_what_is_left(home: Path, size: int) -> None:
    os.truncate(index(home), size)
    runtime = start(home)
    assert len(runtime.agents()) <= 3
    assert runtime.store()["disk"]["read_only"] is False
    runtime.close()
    start(home).close()


@pytest.mark.parametrize("content", [b"", b"no database at all, sorry" * 400, b"\0" * 3 * PAGE])
def test_without_a_readable_index_extents_are_put_aside(home: Path, content: bytes) -> None:
    before = {p.name: p.read_bytes() for p in extents(home)}
    index(home).write_bytes(content)
    runtime = start(home)
    assert runtime.agents() == []
    assert runtime.store()["disk"]["quarantined"] == len(before)
    runtime.close()
    folder = home / "store" / "quarantine"
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not content or content in {p.read_bytes() for p in folder.iterdir()}
    start(home).close()
    assert {p for p in quarantined(home) if p.endswith(".safetensors")} == set(before)


def test_a_damaged_extent_beside_a_damaged_index_counts_once(home: Path, expected: Expected) -> None:
    statement("update pages set tokens = zeroblob(4) where id = 2")(index(home))
    bad = max(extents(home), key=lambda p: p.stat().st_size)
    overwrite(bad, 100, b"\xff")
    runtime = start(home)
    disk = runtime.store()["disk"]
    runtime.close()
    assert disk["quarantined"] >= 1
    in_quarantine = [n for n in quarantined(home) if n.endswith(".safetensors")]
    assert disk["quarantined"] == len(in_quarantine)
    assert bad.name in in_quarantine
    assert ask_all(home).replies == expected.replies


def killed_after(steps: int) -> type[Files]:
    """Files of a process that dies before its step number `steps` + 1."""

    class Mortal(Files):
        def _step(self) -> None:
            nonlocal steps
            if steps == 0:
                raise KeyboardInterrupt
            steps -= 1

        def move(self, path: Path, folder: Path) -> None:
            self._step()
            super().move(path, folder)

        def publish(self, path: Path, target: Path) -> None:
            self._step()
            super().publish(path, target)

    return Mortal


@pytest.mark.parametrize("steps", [0, 1, 2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_rebuild_that_dies_is_ended_by_the_next_start(home: Path, expected: Expected, steps: int) -> None:
    statement("update turns set messages = '[]'")(index(home))
    try:
        rebuild(home / "store", killed_after(steps)(), "a test")
    except KeyboardInterrupt:
        assert steps < 3
    assert ask_all(home) == expected
    assert not (home / "store" / SALVAGED).exists()
    assert "index.sqlite" in quarantined(home)


def test_finishing_without_a_rebuilt_index_does_nothing(home: Path, expected: Expected) -> None:
    finish(home / "store", Files())
    assert ask_all(home) == expected


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("make", [fifo, link, Path.mkdir])
def test_strange_things_among_the_extents_stop_nobody(
    home: Path, expected: Expected, make: Callable[[Path], None]
) -> None:
    folder = home / "store" / "extents"
    names = ["f" * 64 + ".safetensors", "half.tmp", "something"]
    for name in names:
        make(folder / name)
    victim = min(p for p in extents(home) if p.is_file() and not p.is_symlink())
    victim.unlink()
    make(victim)
    assert ask_all(home).replies == expected.replies
    assert set(names) <= set(os.listdir(folder))
    assert Path("/etc/passwd").exists()


@pytest.mark.parametrize("make", [fifo, Path.mkdir])
def test_strange_things_in_place_of_the_index_are_put_aside(home: Path, make: Callable[[Path], None]) -> None:
    index(home).unlink()
    make(index(home))
    runtime = start(home)
    assert runtime.agents() == []
    runtime.close()
    assert "index.sqlite" in quarantined(home)


def test_an_error_message_that_is_no_text_is_damage_too(home: Path, expected: Expected) -> None:
    """SQLite quotes the broken schema in its message; the quotation may be no UTF-8."""
    overwrite(index(home), index(home).read_bytes().index(b"CREATE TABLE pieces"), b"CR\xecATE TABLE pieces")
    assert ask_all(home) == expected


@pytest.mark.parametrize(
    "damage", [lambda p: overwrite(p, 0, b"x"), lambda p: overwrite(p, 40, b"\xff" * 3000)]
)
def test_what_only_the_log_holds_is_kept_when_the_index_is_damaged(
    crashed: Path, tmp_path: Path, expected: Expected, damage: Callable[[Path], None]
) -> None:
    home = copy_of(crashed, tmp_path / "home")
    assert index(home).with_name("index.sqlite-wal").stat().st_size > 10 * PAGE
    damage(index(home))
    assert ask_all(home) == expected


def test_a_log_that_a_killed_process_left_is_read(crashed: Path, tmp_path: Path, expected: Expected) -> None:
    home = copy_of(crashed, tmp_path / "home")
    assert ask_all(home) == expected
    assert quarantined(home) == []
