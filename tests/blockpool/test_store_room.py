"""The store gives room back: compaction, eviction, forgetting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.restore import RestorePlan
from agentmem.blockpool.rows import ExtentRow, TurnCommit
from agentmem.blockpool.store import Store
from tests.blockpool.commits import Author
from tests.blockpool.layout import PAGE, extent_data, geometry
from tests.blockpool.stores import commit, extents, flush, outcome, restore, tokens


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


def test_forget_unlinks_what_only_the_agent_used(folder: Path, opened: Callable[..., Store]) -> None:
    store = opened()
    commit(store, Author(1, name="ada").commit(tokens(), extent=""))
    commit(store, Author(2, name="bob").commit(tokens(1), extent=""), seed=1)
    size = store.size_of(1001)
    freed, error = outcome(store, lambda done: store.forget(1, [1001], done))
    assert (freed, error) == (size, None)
    assert extents(folder) == [store.names[2001]]
    assert [a.name for a in store.index.agents()] == ["bob"]
