"""The index keeps what was committed, refuses what it cannot read, and deletes what was forgotten."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agentmem.blockpool.index import SCHEMA_VERSION, AgentRow, ExtentRow, Index, SessionRow, TurnRow
from agentmem.blockpool.page import Piece
from agentmem.blockpool.schema import IndexDamaged
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


def test_index_of_another_release_is_refused(path: Path) -> None:
    Index(path, "f").close()
    connection = sqlite3.connect(path)
    connection.execute("alter table turns add column mood text")
    connection.execute(f"pragma user_version={SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(
        StoreError, match=f"index version {SCHEMA_VERSION + 1}; this release reads {SCHEMA_VERSION}"
    ):
        Index(path, "f")


@pytest.mark.parametrize(
    "change", [f"pragma user_version={SCHEMA_VERSION + 64}", "drop table copies", "drop index pages_parent"]
)
def test_version_and_tables_that_do_not_go_together_are_damage(path: Path, change: str) -> None:
    Index(path, "f").close()
    connection = sqlite3.connect(path)
    connection.execute(change)
    connection.close()
    with pytest.raises(IndexDamaged, match="tables"):
        Index(path, "f")


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to be taken for one" * 20, b"x" * 5000]
)
def test_a_file_that_is_no_database_is_damage_and_kept(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(IndexDamaged, match="not a database"):
        Index(path, "f")
    assert path.read_bytes() == content


def test_a_foreign_database_is_refused_and_kept(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("create table agents (something text)")
    connection.execute("insert into agents values ('precious')")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="index version 0"):
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


def test_policy_and_lineage_are_kept_across_commits(path: Path, index: Index) -> None:
    author = Author()
    index.commit(author.commit([1, 2], extent="a"))
    author.agent.policy, author.agent.lineage = {"pin": True}, {"parent": "ada", "turn": 3}
    index.update_agent(author.agent)
    index.commit(author.commit([3, 4], extent="b"))
    again = reopened(path)
    assert list(again.agents()) == [author.agent]
    assert (next(again.agents()).policy, again.damaged) == ({"pin": True}, 0)
    again.close()


def forked(author: Author, id: int, base: int, base_turn: int, name: str = "") -> tuple[AgentRow, SessionRow]:
    agent = AgentRow(id, author.agent.namespace, name or f"fork-{id}", 300.0, 300.0, {}, {}, {"parent": base})
    return agent, SessionRow(id, id, "main", None, base, base_turn)


def numbers(index: Index) -> dict[int, list[tuple[int, list[int]]]]:
    return {s.id: [(t.n, t.ids.tolist()) for t in s.turns] for s in index.sessions()}


def test_a_fork_has_the_turns_it_was_made_at_and_then_its_own(index: Index) -> None:
    author = Author()
    for i in range(4):
        index.commit(author.commit([i + 1], extent=f"e{i}"))
    index.fork(*forked(author, 2, base=1, base_turn=2), 1002)
    index.fork(*forked(author, 3, base=2, base_turn=1), 1001)
    own = Author(2, name="fork-2")
    own.session.turns.extend(author.session.turns[:2])
    index.commit(own.commit([70], extent="own"))
    assert numbers(index) == {
        1: [(1, [1]), (2, [2]), (3, [3]), (4, [4])],
        2: [(1, [1]), (2, [2]), (3, [70])],
        3: [(1, [1])],
    }
    sessions = {s.id: s for s in index.sessions()}
    assert (sessions[2].base, sessions[2].base_turn, sessions[3].head) == (1, 2, 1001)
    assert index.damaged == 0


def test_forks_outlive_what_they_were_forked_from(path: Path, index: Index) -> None:
    author = Author()
    for i in range(3):
        index.commit(author.commit([i + 1], extent=f"e{i}"))
    index.fork(*forked(author, 2, base=1, base_turn=2), 1002)
    own = Author(2, name="fork-2")
    own.session.turns.extend(author.session.turns[:2])
    index.commit(own.commit([70], extent="own"))
    index.fork(*forked(author, 3, base=2, base_turn=3), None)
    index.fork(*forked(author, 4, base=2, base_turn=1), None)
    before = numbers(index)
    index.forget(2, [2003])
    assert numbers(index) == {k: v for k, v in before.items() if k != 2}
    index.forget(1, [1003])
    index.close()
    again = reopened(path)
    assert numbers(again) == {3: before[3], 4: before[4]}
    assert [s.base for s in again.sessions()] == [None, None]
    assert again.damaged == 0
    again.close()


def test_a_forgotten_agent_takes_its_own_forks_along(index: Index) -> None:
    author = Author()
    index.commit(author.commit([1, 2], extent="a"))
    index.fork(author.agent, SessionRow(2, 1, "side", None, 1, 1), 1001)
    index.forget(1, [1001])
    assert list(index.sessions()) == []
    assert index.db.execute("select count(*) from copies").fetchone()[0] == 0


def test_compaction_moves_pages_that_are_still_there(index: Index) -> None:
    author = Author()
    index.commit(author.commit([1, 2], extent="a"))
    index.commit(author.commit([3, 4], extent="b"))
    new = ExtentRow(9000, "merged", 77)
    places: list[tuple[int, tuple[Piece, ...]]] = [
        (1001, (Piece(9000, True, 0, 0, 2),)),
        (5555, (Piece(9000, True, 2, 0, 2),)),
    ]
    index.move_pieces(new, "default", places)
    assert [(r[0], r[4]) for r in index.pages("default")] == [
        (1001, places[0][1]),
        (1002, (Piece(1002, False, 0, 0, 2),)),
    ]
    assert [e.name for e in index.unused_extents()] == ["a"]


def test_ids_of_another_tokenizer_are_told_apart(path: Path) -> None:
    index = Index(path, "model with tokenizer 1", "tokenizer 1")
    index.commit(Author().commit([1, 2], extent="a"))
    assert [s.text for s in index.sessions()] == [True]
    index.close()
    for fingerprint, text, same in (("other weights", "tokenizer 1", True), ("other", "tokenizer 2", False)):
        index = Index(path, fingerprint, text)
        assert [(s.text, s.head) for s in index.sessions()] == [(same, None)]
        index.close()


def test_pages_that_are_somebodys_head_leave_no_head_behind(index: Index) -> None:
    author = Author()
    index.commit(author.commit([1, 2], extent="a"))
    index.drop_pages([1001], (), {})
    assert [s.head for s in index.sessions()] == [None]
    assert index.damaged == 0


ALTERED = {
    "agents": "update agents set last_used = last_used + 1",
    "sessions": "update sessions set head = 1001",
    "turns": "update turns set keep_tokens = 1 where n = 2",
    "turn ids": "update turns set ids = x'01000000' where n = 2",
    "pages": "update pages set tokens = x'05000000' where id = 1002",
    "page parent": "update pages set parent = null where id = 1002",
    "pieces": "update pieces set extent_row = 1 where page = 1002",
    "extents": "update extents set bytes = bytes + 1 where id = 1002",
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED.keys())
def test_an_altered_row_is_seen(index: Index, change: str) -> None:
    author = Author()
    for i in range(3):
        index.commit(author.commit([i + 1], extent=f"e{i}"))
    index.db.conn.execute(change)
    agents, sessions, pages = list(index.agents()), list(index.sessions()), list(index.pages("default"))
    extents = list(index.extents())
    assert index.damaged >= 1
    assert len(agents) == (0 if "agents set" in change else 1)
    assert [len(s.turns) for s in sessions] == (
        [] if "sessions set" in change else [1 if "turns set" in change else 3]
    )
    assert [p[0] for p in pages] == ([1001] if "pages set" in change else [1001, 1002, 1003])
    assert [bool(p[4]) for p in pages][1:] == (
        [] if "pages set" in change else ["pieces" not in change, True]
    )
    assert len(extents) == (2 if "extents set" in change else 3)
