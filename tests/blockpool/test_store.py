"""The store: what a commit leaves on disk, and what the next start finds."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agentmem.blockpool.extent import Extent
from agentmem.blockpool.rows import TurnCommit
from agentmem.blockpool.store import Store
from tests.blockpool.commits import Author
from tests.blockpool.layout import PAGE, extent_data, geometry
from tests.blockpool.stores import FINGERPRINT, commit, extents, outcome, restore, tokens


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
