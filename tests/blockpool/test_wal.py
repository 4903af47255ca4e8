"""The write-ahead log: what SQLite would read of it, and what it would pass over."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from agentmem.blockpool.carve import carve
from agentmem.blockpool.wal import FRAME_HEADER, HEADER, PAGE_SIZE, Log, read_log

FRAME = FRAME_HEADER + PAGE_SIZE


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A copy of a database whose log was not folded: ten transactions, the third of them long."""
    path = tmp_path / "live.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"pragma page_size={PAGE_SIZE}")
    connection.execute("pragma journal_mode=wal")
    connection.execute("create table notes (id integer primary key, text text, data blob)")
    for n in range(1, 11):
        connection.execute(
            "insert into notes values (?, ?, ?)", (n, f"note {n} é", bytes([n]) * (9000 if n == 3 else 50))
        )
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", tmp_path / f"copy.sqlite{suffix}")
    connection.close()
    return tmp_path / "copy.sqlite"


def log_file(database: Path) -> Path:
    return database.with_name(database.name + "-wal")


def log(database: Path) -> Log:
    found = read_log(log_file(database).read_bytes())
    assert found is not None
    return found


def readable(database: Path) -> int:
    """Notes that SQLite itself sees, on a copy."""
    copy = database.with_name("seen.sqlite")
    for suffix in ("", "-wal"):
        shutil.copy(f"{database}{suffix}", f"{copy}{suffix}")
    connection = sqlite3.connect(copy)
    try:
        return int(connection.execute("select count(*) from notes").fetchone()[0])
    finally:
        connection.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{copy}{suffix}").unlink(missing_ok=True)


def notes(database: Path) -> set[int]:
    return {rowid for rowid, row in carve(database) if len(row) == 3 and str(row[1]).startswith("note ")}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_a_whole_log_is_sound(database: Path) -> None:
    found = log(database)
    assert found.sound.all()
    assert found.readable == found.written == len(found.sound)
    assert not found.damaged
    assert readable(database) == 10
    assert notes(database) == set(range(1, 11))


def test_a_long_record_is_read_over_its_overflow_pages(database: Path) -> None:
    row = next(row for rowid, row in carve(database) if rowid == 3 and len(row) == 3)
    assert row[1:] == ["note 3 é", bytes([3]) * 9000]


def test_an_end_cut_off_is_no_damage(database: Path) -> None:
    size = log_file(database).stat().st_size
    whole = log_file(database).read_bytes()
    for cut in range(0, size, 997):
        log_file(database).write_bytes(whole[:cut])
        found = read_log(whole[:cut])
        assert found is None or not found.damaged
        if found is not None and found.readable:
            assert len(notes(database)) == readable(database)


def test_an_end_of_zeros_is_no_damage(database: Path) -> None:
    whole = log_file(database).read_bytes()
    for frame in range(1, len(log(database).sound)):
        cut = HEADER + frame * FRAME + 100
        found = read_log(whole[:cut] + bytes(len(whole) - cut))
        assert found is not None
        assert not found.damaged


@pytest.mark.parametrize(
    "part", ["salt", "sum", "page number", "page", "first page", "header salt", "header sum", "magic"]
)
def test_a_flipped_bit_hides_nothing(database: Path, part: str) -> None:
    frame = HEADER + 4 * FRAME
    places = {
        "salt": frame + 9, "sum": frame + 18, "page number": frame + 3, "page": frame + FRAME_HEADER + 4000,
        "first page": HEADER + FRAME_HEADER + 77, "header salt": 17, "header sum": 25, "magic": 2,
    }  # fmt: skip
    flip(log_file(database), places[part])
    assert readable_or_zero(database) < 10
    found = log(database)
    assert found.damaged
    assert found.written > found.readable
    assert notes(database) == set(range(1, 11))


@pytest.mark.parametrize("byte", [3, 7, 9, 14, 18, 22, FRAME_HEADER, FRAME_HEADER + 2048, FRAME - 1])
@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_in_the_last_frame_is_told_from_an_unfinished_one(
    database: Path, byte: int, bit: int
) -> None:
    content = bytearray(log_file(database).read_bytes())
    content[len(content) - FRAME + byte] ^= 1 << bit
    log_file(database).write_bytes(content)
    assert readable_or_zero(database) < 10
    found = log(database)
    assert found.damaged
    assert found.written == len(found.sound)
    assert len(notes(database)) >= 9


@pytest.mark.parametrize("byte", [9, 18, 22, FRAME_HEADER + 5, FRAME - 2])
def test_a_flipped_bit_in_the_last_frame_but_one_hides_nothing(database: Path, byte: int) -> None:
    flip(log_file(database), log_file(database).stat().st_size - 2 * FRAME + byte)
    found = log(database)
    assert found.damaged
    assert found.written == len(found.sound)
    assert notes(database) == set(range(1, 11))


def test_single_bits_are_set_right_where_it_is_known_which(database: Path) -> None:
    data, whole = log_file(database).read_bytes(), log(database).content()
    rng, right = random.Random(1), 0
    for _ in range(300):
        at = rng.randrange(HEADER, len(data))
        content = bytearray(data)
        content[at] ^= 1 << rng.randrange(8)
        found = read_log(bytes(content))
        assert found is not None
        assert found.written == len(found.sound), at
        right += found.content() == whole
    assert right > 200


def readable_or_zero(database: Path) -> int:
    try:
        return readable(database)
    except sqlite3.DatabaseError:
        return 0


def test_the_log_of_an_older_generation_is_left_alone(database: Path) -> None:
    """After a checkpoint SQLite writes from the log's beginning again; what lies behind is old."""
    path = database.with_name("again.sqlite")
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("pragma journal_mode=wal")
    connection.execute("create table notes (id integer primary key, text text, data blob)")
    for n in range(20):
        connection.execute("insert into notes values (?, ?, ?)", (n, f"note {n}", b"old"))
    connection.execute("pragma wal_checkpoint(passive)")
    connection.execute("insert into notes values (?, ?, ?)", (99, "note 99", b"new"))
    data = path.with_name("again.sqlite-wal").read_bytes()
    connection.close()
    found = read_log(data)
    assert found is not None
    assert len(found.sound) < (len(data) - HEADER) // FRAME
    assert not found.damaged
    assert found.written == found.readable > 0


def test_no_frames_are_no_log() -> None:
    assert read_log(b"") is None
    assert read_log(bytes(HEADER)) is None
    found = read_log(bytes(HEADER + FRAME))
    assert found is not None
    assert not found.damaged


def test_sums_are_sqlites(database: Path) -> None:
    """Against the definition, word by word."""
    data = log_file(database).read_bytes()
    a = b = 0
    for x, y in np.frombuffer(data, "<u4", 6).reshape(-1, 2).tolist():
        a = (a + x + b) & 0xFFFFFFFF
        b = (b + y + a) & 0xFFFFFFFF
    assert (a, b) == tuple(np.frombuffer(data, ">u4", 2, 24).tolist())
