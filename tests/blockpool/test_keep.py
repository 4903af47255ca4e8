"""The keep: what is put is there after a restart, whole, within its budget; what is damaged is not."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from agentmem.blockpool.failpoint import FAILPOINTS
from agentmem.blockpool.files import Files
from agentmem.blockpool.keep import MARGIN, Changes, Keep
from agentmem.blockpool.keepsake import Array, Keepsake, KeepsakeDamaged, read_keepsake, write_keepsake

ROOM = 1 << 24


def keepsake(key: str, size: int = 100, seed: int = 0) -> Keepsake:
    data = np.random.default_rng(seed).integers(0, 256, 4 * size).astype(np.uint8)
    codes, ids = Array("U32", (size // 2, 2), data), Array("I32", (3,), np.arange(12, dtype=np.uint8))
    return Keepsake(key, {"seed": seed}, {"codes": codes, "ids": ids})


def put(keep: Keep, *keys: str, score: float = 1.0, size: int = 100) -> None:
    keepsakes = [keepsake(key, size, seed) for seed, key in enumerate(keys)]
    keep.apply(Changes(put=keepsakes, states={key: (score, {"owners": ["a"]}) for key in keys}))


def test_a_keepsake_is_a_safetensors_file(tmp_path: Path) -> None:
    wanted = keepsake("a")
    name, size = write_keepsake(tmp_path, wanted, "model", Files())
    assert (tmp_path / name).stat().st_size == size
    arrays = load_file(tmp_path / name)
    assert arrays["codes"].tobytes() == wanted.arrays["codes"].data.tobytes()
    found = read_keepsake(tmp_path / name, "model")
    assert (found.key, found.about) == ("a", {"seed": 0})
    assert all(
        (a.dtype, a.shape, a.data.tobytes()) == (b.dtype, b.shape, b.data.tobytes())
        for a, b in zip(found.arrays.values(), wanted.arrays.values(), strict=True)
    )


def test_every_byte_is_checked(tmp_path: Path) -> None:
    name, size = write_keepsake(tmp_path, keepsake("a", 8), "model", Files())
    data = (tmp_path / name).read_bytes()
    for at in range(size):
        (tmp_path / name).write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(KeepsakeDamaged):
            read_keepsake(tmp_path / name, "model")
    for wrong in (data[:-1], data + b"\0", data[:7], b"", struct.pack("<Q", 1 << 62) + data[8:]):
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(KeepsakeDamaged):
            read_keepsake(tmp_path / name, "model")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(KeepsakeDamaged, match="another model"):
        read_keepsake(tmp_path / name, "other")


def test_changes_are_there_after_a_restart(tmp_path: Path) -> None:
    keep = Keep(tmp_path, "model", ROOM)
    put(keep, "a", "b", "c")
    keep.apply(Changes(drop={"b"}, states={"c": (5.0, {"owners": ["z"]})}, notes={"n": "said", "m": "more"}))
    keep.apply(Changes(notes={"m": None}))
    again = Keep(tmp_path, "model", ROOM)
    assert [(k.key, k.score, k.state) for k in again.kept()] == [
        ("c", 5.0, {"owners": ["z"]}), ("a", 1.0, {"owners": ["a"]}),
    ]  # fmt: skip
    assert again.notes() == {"n": "said"}
    found = again.read("c")
    assert found is not None
    assert found.about == {"seed": 2}
    assert again.read("b") is None
    assert len(os.listdir(again.items)) == 2
    assert again.nbytes == sum(p.stat().st_size for p in again.items.iterdir())


def test_what_is_put_again_replaces_what_was(tmp_path: Path) -> None:
    keep = Keep(tmp_path, "model", ROOM)
    put(keep, "a")
    keep.apply(Changes(put=[keepsake("a", 50, seed=9)], states={"a": (1.0, {})}))
    found = Keep(tmp_path, "model", ROOM).read("a")
    assert found is not None
    assert found.about == {"seed": 9}
    assert len(os.listdir(keep.items)) == 1


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 600), st.integers(0, 9), st.booleans()), max_size=25)
)
@settings(deadline=None, max_examples=25)
def test_the_budget_holds_always(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[int, int, int, bool]]
) -> None:
    budget = 3 * (2000 + MARGIN)
    keep = Keep(tmp_path_factory.mktemp("keep"), "model", budget, Files(durable=False))
    for key, size, score, drop in events:
        if drop:
            keep.apply(Changes(drop={str(key)}))
        else:
            put(keep, str(key), score=score, size=2 * size)
        files = [p.stat().st_size for p in keep.items.iterdir()]
        assert sum(files) == keep.nbytes <= budget
        assert len(files) == len(keep.kept())
    again = Keep(keep.folder, "model", budget)
    assert again.kept() == keep.kept()


def test_the_least_useful_leaves_first_and_is_not_let_in(tmp_path: Path) -> None:
    keep = Keep(tmp_path, "model", 9000)
    put(keep, "useful", score=3, size=500)
    put(keep, "less", score=1, size=500)
    put(keep, "more", score=2, size=500)
    assert [k.key for k in keep.kept()] == ["useful", "more"]
    put(keep, "least", score=0, size=500)
    assert [k.key for k in keep.kept()] == ["useful", "more"]
    put(keep, "huge", score=9, size=5000)
    assert "huge" not in [k.key for k in keep.kept()]


def test_what_no_row_names_is_swept(tmp_path: Path) -> None:
    keep = Keep(tmp_path, "model", ROOM)
    put(keep, "a", "b")
    keep.close()
    victim = next(keep.items.iterdir())
    (keep.items / "x.tmp").write_bytes(b"half")
    (keep.items / f"{'0' * 64}.safetensors").write_bytes(b"whole")
    (keep.items / "notes.txt").write_bytes(b"not ours")
    victim.unlink()
    again = Keep(tmp_path, "model", ROOM)
    assert len(again.kept()) == 1
    assert len(os.listdir(again.items)) == 2
    assert (again.items / "notes.txt").exists()


def test_altered_rows_are_not_believed(tmp_path: Path) -> None:
    keep = Keep(tmp_path, "model", ROOM)
    put(keep, "a", "b")
    keep.apply(Changes(notes={"n": "said", "m": "more"}))
    keep._db.execute("update items set state = '{\"owners\": []}' where key = 'a'")
    keep._db.execute("update notes set data = 'lie' where key = 'n'")
    again = Keep(tmp_path, "model", ROOM)
    assert [k.key for k in again.kept()] == ["b"]
    assert again.notes() == {"m": "more"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    keep = Keep(tmp_path, "model", ROOM)
    put(keep, "a")

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "writev", fail)
    put(keep, "b")
    monkeypatch.undo()
    assert [k.key for k in keep.kept()] == ["a"]
    assert len(os.listdir(keep.items)) == 1
    assert (keep.problem is None) == (code == errno.ENOSPC)
    put(keep, "c")
    assert len(keep.kept()) == (2 if code == errno.ENOSPC else 1), "a full disk passes, a broken one does not"


def test_a_failed_transaction_leaves_no_file(tmp_path: Path) -> None:
    keep = Keep(tmp_path, "model", ROOM)
    put(keep, "a")
    keep._db.execute("create trigger refuse before insert on items begin select raise(abort, 'no'); end")
    put(keep, "b")
    assert keep.problem is not None
    assert len(os.listdir(keep.items)) == 1


def test_an_index_of_other_tables_is_put_aside(tmp_path: Path) -> None:
    keep = Keep(tmp_path, "model", ROOM)
    put(keep, "a")
    keep._db.execute("alter table items add column more")
    keep.close()
    again = Keep(tmp_path, "model", ROOM)
    assert again.kept() == []
    assert (again.aside / "keep.sqlite").is_file()
    put(again, "b")
    assert [k.key for k in Keep(tmp_path, "model", ROOM).kept()] == ["b"]


LIFE = """
import sys
from pathlib import Path
from agentmem.blockpool.failpoint import arm
from tests.blockpool.test_keep import Keep, put, Changes, ROOM
keep = Keep(Path(sys.argv[1]), "model", ROOM)
arm(sys.argv[2])
put(keep, "c")
put(keep, "a", "d")
keep.apply(Changes(drop={"b", "c"}, notes={"n": "said"}))
"""
STEPS = [set("ab"), set("abc"), set("abcd"), set("ad")]
POINTS = [p for p in FAILPOINTS if p.startswith(("file.", "index.", "unlink."))]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_what_one_change_left(tmp_path: Path, point: str) -> None:
    """Whole keepsakes, no file that no row names, and a note only with its change."""
    for n in (1, 2):
        keep = Keep(tmp_path / str(n), "model", ROOM)
        put(keep, "a", "b")
        keep.close()
        done = subprocess.run(
            [sys.executable, "-c", LIFE, str(keep.folder), f"{point}:{n}"], check=False, timeout=120
        )
        assert done.returncode == -signal.SIGKILL
        again = Keep(keep.folder, "model", ROOM)
        keys = {k.key for k in again.kept()}
        assert keys in STEPS
        assert all(again.read(key) is not None for key in keys)
        assert len(os.listdir(again.items)) == len(keys)
        assert again.notes() == ({"n": "said"} if keys == STEPS[-1] else {})
