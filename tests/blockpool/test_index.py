"""The index keeps what was committed, refuses what it cannot read, and deletes what was forgotten."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agentmem.blockpool.index import SCHEMA_VERSION, Index, TurnRow
from agentmem.blockpool.page import Piece
from agentmem.errors import StoreError
from tests.blockpool.commits import Author


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    index = Index(path, "fingerprint")
    yield index
    index.close()


def reopened(path: Path, fingerprint: str = "fingerprint") -> Index:
    return Index(path, fingerprint)


def same_turn(a: TurnRow, b: TurnRow) -> bool:
    fields = ("n", "keep_tokens", "keep_messages", "spans", "messages", "stats", "created")
    return all(getattr(a, f) == getattr(b, f) for f in fields) and np.array_equal(a.ids, b.ids)


def test_commits_come_back_with_every_turn(path: Path, index: Index) -> None:
    author = Author()
    for i, extent in enumerate(["a", None, "b"]):
        index.commit(author.commit([10 * i + 1, 10 * i + 2, 10 * i + 3], extent=extent))
    again = reopened(path)
    assert again.namespaces() == ["default"]
    assert list(again.agents()) == [author.agent]
    (session,) = again.sessions()
    assert (session.name, session.agent, session.head) == ("main", 1, 1003)
    assert len(session.turns) == 3
    assert all(same_turn(a, b) for a, b in zip(session.turns, author.session.turns, strict=True))
    pages = [
        (id_, parent, raw, list(tokens), pieces)
        for id_, parent, raw, tokens, pieces in again.pages("default")
    ]
    assert pages == [
        (1001, None, True, [1, 2, 3], (Piece(1001, True, 0, 0, 3),)),
        (1003, 1001, False, [21, 22, 23], (Piece(1003, False, 0, 0, 3),)),
    ]
    assert [(e.id, e.name, e.bytes) for e in again.extents()] == [(1001, "a", 10010), (1003, "b", 10030)]
    assert again.last_ids() == {"pages": 1003, "extents": 1003, "agents": 1, "sessions": 1}
    again.close()


def test_pages_of_several_pieces_keep_their_order(path: Path, index: Index) -> None:
    author = Author()
    index.commit(author.commit([1, 2], extent="a"))
    commit = author.commit([3, 4, 5, 6], extent="b")
    page = commit.pages[0][0]
    pieces = (Piece(1001, True, 1, 0, 1), Piece(1002, False, 0, 1, 3))
    commit.pages = [(page, pieces[::-1])]
    index.commit(commit)
    assert next(r for r in index.pages("default") if r[0] == page.id)[4] == pieces


def test_a_failed_commit_changes_nothing(path: Path, index: Index) -> None:
    author = Author()
    index.commit(author.commit([1, 2], extent="a"))
    bad = author.commit([3, 4], extent="b")
    bad.pages = [(bad.pages[0][0], (Piece(999, False, 0, 0, 2),))]
    with pytest.raises(sqlite3.IntegrityError):
        index.commit(bad)
    (session,) = index.sessions()
    assert len(session.turns) == 1
    assert [e.name for e in index.extents()] == ["a"]
    assert len(list(index.pages("default"))) == 1
    author.session.turns.pop()
    index.commit(author.commit([3, 4], extent="c"))
    assert [e.name for e in index.extents()] == ["a", "c"]


def test_dropped_pages_free_their_extent(index: Index) -> None:
    author = Author()
    index.commit(author.commit([1, 2], extent="a"))
    assert index.unused_extents() == []
    first, author.last = author.last, None
    assert first is not None
    assert first.id is not None
    index.commit(author.commit([1, 2, 3], extent="b", dropped=[first.id]))
    (unused,) = index.unused_extents()
    assert unused.name == "a"
    index.delete_extents([unused])
    assert [e.name for e in index.extents()] == ["b"]


def test_another_fingerprint_sees_tokens_but_no_state(path: Path, index: Index) -> None:
    author = Author()
    index.commit(author.commit([1, 2, 3], extent="a"))
    other = reopened(path, "another model")
    assert other.namespaces() == []
    assert list(other.pages("default")) == []
    (session,) = other.sessions()
    assert session.head is None
    assert list(session.turns[0].ids) == [1, 2, 3]
    assert [e.name for e in other.extents()] == ["a"]
    other.close()
    (session,) = reopened(path).sessions()
    assert session.head == 1001


def test_namespaces_are_apart(index: Index) -> None:
    for author in (Author(1, "red"), Author(2, "blue")):
        index.commit(author.commit([1, 2, 3], extent=author.agent.namespace))
    assert sorted(index.namespaces()) == ["blue", "red"]
    assert [r[0] for r in index.pages("red")] == [1001]
    assert [r[0] for r in index.pages("blue")] == [2001]


def test_forget_deletes_the_agent_and_its_tokens_from_the_file(path: Path, index: Index) -> None:
    author, other = Author(1, name="ada"), Author(2, name="bob")
    secret = TurnRow(
        1, 0, 0, np.array([7] * 64, np.int32), [], [{"role": "user", "content": "SECRETWORD"}], {}, 1.0
    )
    commit = author.commit([1, 2, 3], extent="a")
    commit.turn = secret
    index.commit(commit)
    index.commit(other.commit([4, 5], extent="b"))
    assert b"SECRETWORD" in path.read_bytes() + path.with_name("index.sqlite-wal").read_bytes()
    index.forget(1, [1001])
    index.delete_extents(index.unused_extents())
    index.checkpoint()
    assert [a.name for a in index.agents()] == ["bob"]
    assert [s.id for s in index.sessions()] == [2]
    assert [e.name for e in index.extents()] == ["b"]
    assert b"SECRETWORD" not in path.read_bytes() + path.with_name("index.sqlite-wal").read_bytes()


def test_dropping_damaged_pages_moves_heads(index: Index) -> None:
    author = Author()
    index.commit(author.commit([1, 2], extent="a"))
    index.commit(author.commit([3, 4], extent="b"))
    index.drop_pages([1002], bare=[1001], heads={1: 1001})
    (session,) = index.sessions()
    assert session.head == 1001
    assert [(r[0], r[4]) for r in index.pages("default")] == [(1001, ())]
    assert [e.name for e in index.unused_extents()] == ["a", "b"]


def test_index_of_another_version_is_refused(path: Path) -> None:
    Index(path, "f").close()
    connection = sqlite3.connect(path)
    connection.execute(f"pragma user_version={SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(
        StoreError, match=f"index version {SCHEMA_VERSION + 1}; this release reads {SCHEMA_VERSION}"
    ):
        Index(path, "f")


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to be taken for one" * 20, b"x" * 5000]
)
def test_a_file_that_is_no_database_is_refused_and_kept(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreError, match="not a readable index"):
        Index(path, "f")
    assert path.read_bytes() == content


def test_a_foreign_database_is_refused_and_kept(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("create table agents (something text)")
    connection.execute("insert into agents values ('precious')")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="not a readable index"):
        Index(path, "f")
    assert sqlite3.connect(path).execute("select * from agents").fetchall() == [("precious",)]


def test_an_empty_file_becomes_an_index(path: Path) -> None:
    path.write_bytes(b"")
    index = Index(path, "f")
    assert list(index.agents()) == []
    index.close()


def test_durable_commits_reach_the_disk(path: Path, index: Index) -> None:
    query = index.db.execute
    assert query("pragma journal_mode").fetchone()[0] == "wal"
    assert query("pragma synchronous").fetchone()[0] == 2
    assert query("pragma foreign_keys").fetchone()[0] == 1
    assert query("pragma secure_delete").fetchone()[0] == 1
    loose = Index(path.with_name("loose.sqlite"), "f", durable=False)
    assert loose.db.execute("pragma synchronous").fetchone()[0] == 0
    loose.close()
