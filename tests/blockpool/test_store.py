"""The store: what a commit leaves on disk, what a fault leaves, and what the next start finds."""

from __future__ import annotations

import errno
import os
import queue
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.blockpool.extent import Extent
from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.restore import RestorePlan
from agentmem.blockpool.rows import ExtentRow, TurnCommit
from agentmem.blockpool.store import Store
from tests.blockpool.commits import Author
from tests.blockpool.layout import PAGE, extent_data, geometry

FINGERPRINT = "fingerprint"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    os.umask(0o077)
    (tmp_path / "store").mkdir(mode=0o700)
    return tmp_path / "store"


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[[], Store]]:
    """Opens the store again and again, one at a time, as one daemon after the other does."""
    stores: list[Store] = []

    def run(**options: Any) -> Store:
        if stores:
            stores.pop().close()
        stores.append(Store(folder, FINGERPRINT, **options))
        return stores[0]

    yield run
    for store in stores:
        store.close()


def outcome(store: Store, submit: Callable[[Callable[..., None]], None]) -> tuple[Any, ...]:
    """Submit a job and run its completion, as the engine thread does."""
    got: list[tuple[Any, ...]] = []
    submit(lambda *result: got.append(result))
    while not got:
        store.completions.get(timeout=30)()
    return got[0]


def commit(store: Store, turn: TurnCommit, seed: int = 0) -> tuple[int | None, Exception | None]:
    rows = (lambda: extent_data(geometry(), 0, PAGE, seed)) if turn.extent else None
    written, error = outcome(store, lambda done: store.commit(turn, rows, done))
    return written, error


def tokens(seed: int = 0) -> list[int]:
    return list(range(seed, seed + PAGE))


def extents(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "extents"))


def test_a_commit_is_one_extent_and_one_turn(folder: Path, opened: Callable[..., Store]) -> None:
    author, store = Author(), opened()
    turn = author.commit(tokens(), extent="")
    written, error = commit(store, turn)
    assert error is None
    assert turn.extent is not None
    assert extents(folder) == [turn.extent.name]
    path = store.path(turn.extent.id)
    assert (
        written == path.stat().st_size == turn.extent.bytes == store.shelf.extent_bytes == store.bytes_written
    )
    Extent(path).close()
    again = opened()
    assert again.names == {1001: turn.extent.name}
    assert again.shelf.extent_bytes == written
    assert [len(s.turns) for s in again.index.sessions()] == [1]


def test_a_turn_without_rows_writes_no_extent(folder: Path, opened: Callable[..., Store]) -> None:
    store = opened()
    assert commit(store, Author().commit([1], extent=None)) == (0, None)
    assert extents(folder) == []
    assert [len(s.turns) for s in store.index.sessions()] == [1]


def test_files_and_folders_are_private(folder: Path, opened: Callable[..., Store]) -> None:
    store = opened()
    commit(store, Author().commit(tokens(), extent=""))
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_index_knows_an_extent_only_when_it_is_in_place(
    folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    real, seen = store.index.commit, []

    def look(turn: TurnCommit) -> None:
        seen.append(extents(folder))
        real(turn)

    monkeypatch.setattr(store.index, "commit", look)
    turn = Author().commit(tokens(), extent="")
    commit(store, turn)
    assert turn.extent is not None
    assert seen == [[turn.extent.name]]


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


def test_start_sweeps_orphans_and_temporary_files(folder: Path, opened: Callable[..., Store]) -> None:
    store = opened()
    commit(store, Author().commit(tokens(), extent=""))
    kept = extents(folder)
    (folder / "extents" / ("0" * 64 + ".safetensors")).write_bytes(b"written, never committed")
    (folder / "extents" / "half.tmp").write_bytes(b"half")
    opened()
    assert extents(folder) == kept
    assert not (folder / "quarantine").exists()


def test_start_survives_folders_where_files_should_be(folder: Path, opened: Callable[..., Store]) -> None:
    opened()
    for name in ("0" * 64 + ".safetensors", "half.tmp"):
        (folder / "extents" / name).mkdir()
        (folder / "extents" / name / "inner").write_bytes(b"1")
    assert opened().status()["read_only"] is False


def test_extents_beside_a_new_index_are_kept_apart(folder: Path) -> None:
    store = Store(folder, FINGERPRINT)
    commit(store, Author().commit(tokens(), extent=""))
    (name,) = extents(folder)
    content = (folder / "extents" / name).read_bytes()
    store.close()
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    fresh = Store(folder, FINGERPRINT)
    try:
        assert extents(folder) == []
        assert (folder / "quarantine" / name).read_bytes() == content
        assert list(fresh.index.agents()) == []
    finally:
        fresh.close()


def test_extents_of_another_fingerprint_survive_the_sweep(folder: Path) -> None:
    store = Store(folder, FINGERPRINT)
    commit(store, Author().commit(tokens(), extent=""))
    store.close()
    before = extents(folder)
    Store(folder, "another model").close()
    assert extents(folder) == before
    again = Store(folder, FINGERPRINT)
    assert len(list(again.index.pages("default"))) == 1
    again.close()


def test_forget_unlinks_what_only_the_agent_used(folder: Path, opened: Callable[..., Store]) -> None:
    store = opened()
    commit(store, Author(1, name="ada").commit(tokens(), extent=""))
    commit(store, Author(2, name="bob").commit(tokens(1), extent=""), seed=1)
    size = store.size_of(1001)
    freed, error = outcome(store, lambda done: store.forget(1, [1001], done))
    assert (freed, error) == (size, None)
    assert extents(folder) == [store.names[2001]]
    assert [a.name for a in store.index.agents()] == ["bob"]


def restore(store: Store, turn: TurnCommit) -> tuple[list[np.ndarray], dict[int, str]]:
    page, pieces = turn.pages[0]
    wanted = Page(None, page.tokens, b"", True, pieces=pieces)
    g = geometry()
    views = [np.zeros((4, w), np.uint32) for w in g.slot_words]
    plan = RestorePlan(g, [(wanted, (0, 1, 2, 3))])
    read = outcome(store, lambda done: store.restore(plan, views, done))[0]
    return views, read.bad


def test_restore_of_a_committed_turn(opened: Callable[..., Store]) -> None:
    store = opened()
    turn = Author().commit(tokens(), extent="")
    commit(store, turn)
    views, bad = restore(store, turn)
    assert not bad
    g = geometry()
    want = extent_data(g, 0, PAGE).raw[0]
    got = views[0][:, : g.raw_per_slot * g.raw_words[0]].reshape(-1, g.raw_words[0])
    assert np.array_equal(got, want)


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


def flush(store: Store) -> None:
    """Wait until the writer has done what it was given before."""
    done: queue.Queue[None] = queue.Queue()
    store._jobs.put(lambda: done.put(None))
    done.get(timeout=30)


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


class Gate:
    """Holds the store's restores back until it is opened."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.inside = threading.Event()
        real = store._reader.read

        def read(*args: Any) -> Any:
            self.inside.set()
            assert self.open.wait(timeout=30)
            return real(*args)

        monkeypatch.setattr(store._reader, "read", read)


def merged(store: Store, turn: TurnCommit, number: int, done: Callable[..., None]) -> None:
    """Compact the turn's one page into a new extent."""
    assert turn.extent is not None
    moved = [(turn.pages[0][0].id, (Piece(number, True, 0, 0, PAGE),))]
    store.compact(lambda: extent_data(geometry(), 0, PAGE), ExtentRow(number, "", 0), moved, done)  # type: ignore[arg-type]


def test_compaction_replaces_the_extent(folder: Path, opened: Callable[..., Store]) -> None:
    store, turn = opened(), Author().commit(tokens(), extent="")
    commit(store, turn)
    (before,) = extents(folder)
    written, error = outcome(store, lambda done: merged(store, turn, 5000, done))
    flush(store)
    (after,) = extents(folder)
    assert error is None
    assert after != before
    assert store.names == {5000: after}
    assert written == store.shelf.extent_bytes == (folder / "extents" / after).stat().st_size
    page = turn.pages[0][0]
    turn.pages = [(page, (Piece(5000, True, 0, 0, PAGE),))]
    assert restore(store, turn)[1] == {}
    assert [r[4] for r in opened().index.pages("default")] == [turn.pages[0][1]]


def test_a_running_restore_keeps_the_files_that_compaction_replaced(
    folder: Path, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, turn = opened(), Author().commit(tokens(), extent="")
    commit(store, turn)
    (before,) = extents(folder)
    gate = Gate(store, monkeypatch)
    results: list[Any] = []
    g = geometry()
    wanted = Page(None, turn.pages[0][0].tokens, b"", True, pieces=turn.pages[0][1])
    plan = RestorePlan(g, [(wanted, (0, 1, 2, 3))])
    store.restore(plan, [np.zeros((4, w), np.uint32) for w in g.slot_words], results.append)
    assert gate.inside.wait(timeout=30)
    assert outcome(store, lambda done: merged(store, turn, 5000, done))[1] is None
    flush(store)
    assert before in extents(folder)
    assert len(extents(folder)) == 2
    gate.open.set()
    while not results:
        store.completions.get(timeout=30)()
    flush(store)
    assert results[0].bad == {}
    assert extents(folder) == [store.names[5000]]


def test_evicted_pages_free_their_bytes(folder: Path, opened: Callable[..., Store]) -> None:
    author, store = Author(), opened()
    first, second = author.commit(tokens(), extent=""), author.commit(tokens(1), extent="")
    for turn in (first, second):
        commit(store, turn)
    before, size = store.disk_bytes, store.size_of(1002)
    assert outcome(store, lambda done: store.evict([1002], {1: 1001}, done)) == (size, None)
    assert extents(folder) == [store.names[1001]]
    assert store.disk_bytes <= before - size + 65536
    (session,) = opened().index.sessions()
    assert (session.head, len(session.turns)) == (1001, 2)


def test_other_changes_of_the_index_run_on_the_writer(opened: Callable[..., Store]) -> None:
    author, store = Author(), opened()
    commit(store, author.commit(tokens(), extent=""))
    author.agent.policy = {"pin": True}
    assert outcome(store, lambda done: store.change(lambda i: i.update_agent(author.agent), done)) == (None,)
    (error,) = outcome(store, lambda done: store.change(lambda i: i.delete_extents(None), done))  # type: ignore[arg-type]
    assert isinstance(error, TypeError)
    assert [a.policy for a in opened().index.agents()] == [{"pin": True}]


def test_close_finishes_the_queued_writes(folder: Path) -> None:
    store = Store(folder, FINGERPRINT)
    authors = [Author(i) for i in range(1, 9)]
    for i, author in enumerate(authors):
        turn = author.commit(tokens(i), extent="")
        store.commit(turn, lambda i=i: extent_data(geometry(), 0, PAGE, i), lambda *_: None)  # type: ignore[misc]
    store.close()
    again = Store(folder, FINGERPRINT)
    assert len(list(again.index.sessions())) == 8
    assert len(extents(folder)) == 8
    again.close()


def test_policy_none_syncs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    store = Store(folder, FINGERPRINT, durable=False)
    assert commit(store, Author().commit(tokens(), extent=""))[1] is None
    store.close()
    assert calls == []
    again = Store(folder, FINGERPRINT, durable=True)
    assert commit(again, Author(2).commit(tokens(1), extent=""), seed=1)[1] is None
    again.close()
    assert len(calls) >= 2
