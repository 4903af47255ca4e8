"""The store when the disk fails, is full, or has damaged what lies on it."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmem.blockpool.store import Store
from tests.blockpool.commits import Author
from tests.blockpool.stores import commit, extents, flush, restore, tokens


def fail_with(number: int) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_an_fsync_error_makes_the_store_read_only_for_good(
    folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    author, store = Author(), opened()
    commit(store, author.commit(tokens(), extent=""))
    before = extents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_with(errno.EIO))
        written, error = commit(store, author.commit(tokens(1), extent=""), seed=1)
    assert written is None
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert store.status()["read_only"]
    assert "Input/output error" in store.status()["problem"]
    assert extents(folder) == before
    written, error = commit(store, author.commit(tokens(2), extent=""), seed=2)
    assert written is None
    assert "read-only" in str(error)
    assert extents(folder) == before
    again = opened()
    assert not again.status()["read_only"]
    assert [len(s.turns) for s in again.index.sessions()] == [1]


def test_a_full_disk_is_no_alarm_and_passes(
    folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, store = Author().commit(tokens(), extent=""), opened()
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", fail_with(errno.ENOSPC))
        written, error = commit(store, turn)
    assert written is None
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    assert not store.status()["read_only"]
    assert extents(folder) == []
    assert commit(store, turn)[1] is None
    assert len(extents(folder)) == 1


def test_a_disk_that_is_full_for_the_index_is_no_alarm_and_leaves_no_extent(
    folder: Path, opened: Callable[..., Store]
) -> None:
    store = opened()
    pages = store.index.db.execute("pragma page_count").fetchone()[0]
    store.index.db.execute(f"pragma max_page_count={pages}")
    big = Author().commit(tokens(), extent="")
    big.turn.messages = [{"role": "user", "content": "x" * 200_000}]
    written, error = commit(store, big)
    assert written is None
    assert isinstance(error, sqlite3.Error)
    assert not store.status()["read_only"]
    assert extents(folder) == []
    store.index.db.execute("pragma max_page_count=1000000")
    assert commit(store, big)[1] is None
    assert [t.messages for s in opened().index.sessions() for t in s.turns] == [big.turn.messages]


def test_a_damaged_extent_is_quarantined_and_its_pages_dropped(
    folder: Path, opened: Callable[..., Store]
) -> None:
    author, store = Author(), opened()
    turn = author.commit(tokens(), extent="")
    commit(store, turn)
    later = author.commit(tokens(1), extent="")
    commit(store, later, seed=1)
    assert turn.extent is not None
    path = store.path(turn.extent.id)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)
    _, bad = restore(store, turn)
    assert "checksum" in bad[1001]
    store.quarantine(bad, [1001, 1002], [], {1: None})
    flush(store)
    assert (folder / "quarantine" / path.name).read_bytes() == bytes(content)
    assert extents(folder) == []
    assert store.status()["quarantined"] == 1
    again = opened()
    assert list(again.index.pages("default")) == []
    (session,) = again.index.sessions()
    assert session.head is None
    assert len(session.turns) == 2


def test_a_restore_that_breaks_still_has_an_outcome(
    opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    turn = Author().commit(tokens(), extent="")
    commit(store, turn)

    def broken(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(store._reader, "read", broken)
    assert restore(store, turn)[1] == {1001: "MemoryError: no room"}
