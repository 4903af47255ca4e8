"""The SQLite index: agents, sessions and the token log (primary), pages and where their rows lie (rebuildable from extents).

All writes happen on the writer thread, one transaction per commit, after the extent is durable.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sqlite_utils import Database

from agentmem.blockpool.page import Page, Piece
from agentmem.errors import StoreError

SCHEMA_VERSION = 1

_SCHEMA = """
create table spaces (id integer primary key, fingerprint text not null, namespace text not null, unique (fingerprint, namespace));
create table extents (id integer primary key, name text not null unique, space integer not null references spaces,
    bytes integer not null, created real not null);
create table pages (id integer primary key, space integer not null references spaces, parent integer references pages,
    raw integer not null, tokens blob not null);
create index pages_parent on pages (parent);
create table pieces (page integer not null references pages on delete cascade, page_row integer not null,
    extent integer not null references extents, raw integer not null, extent_row integer not null, rows integer not null,
    primary key (page, page_row)) without rowid;
create index pieces_extent on pieces (extent);
create table agents (id integer primary key, namespace text not null, name text not null, created real not null,
    last_used real not null, totals text not null default '{}', unique (namespace, name));
create table sessions (id integer primary key, agent integer not null references agents on delete cascade, name text not null,
    space integer not null references spaces, head integer references pages on delete set null, unique (agent, name));
create table turns (session integer not null references sessions on delete cascade, n integer not null,
    keep_tokens integer not null, keep_messages integer not null,
    ids blob not null, spans text not null, messages text not null, stats text not null, created real not null,
    primary key (session, n)) without rowid;
"""


@dataclass(slots=True)
class TurnRow:
    """One entry of the token log: what this turn kept of the session before it, and what it added."""

    n: int
    keep_tokens: int
    keep_messages: int
    ids: np.ndarray
    spans: list[Any]
    messages: list[dict[str, Any]]
    stats: dict[str, Any]
    created: float


@dataclass(slots=True)
class SessionRow:
    """A session as the index knows it. `head` is the id of the last page of its state, or None."""

    id: int
    agent: int
    name: str
    head: int | None
    turns: list[TurnRow] = field(default_factory=list)


@dataclass(slots=True)
class AgentRow:
    """An agent as the index knows it. `totals` are counters over its life."""

    id: int
    namespace: str
    name: str
    created: float
    last_used: float
    totals: dict[str, Any]


@dataclass(slots=True)
class ExtentRow:
    id: int
    name: str
    bytes: int


@dataclass(slots=True)
class TurnCommit:
    """Everything that one turn changes, for one transaction. Page and extent ids are assigned beforehand.

    `earlier` are turns of the session before this one that could not be written when they ended.
    """

    agent: AgentRow
    session: SessionRow
    turn: TurnRow
    head: Page | None
    pages: list[tuple[Page, tuple[Piece, ...]]]
    dropped: list[int]
    extent: ExtentRow | None = None
    earlier: list[TurnRow] = field(default_factory=list)


def connect(path: Path, durable: bool) -> Database:
    """Open (or create) the index in WAL mode; raises StoreError when the file is no index of ours."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for pragma in (
            "journal_mode=wal",
            f"synchronous={'full' if durable else 'off'}",
            "foreign_keys=on",
            "secure_delete=on",
            *(("fullfsync=1", "checkpoint_fullfsync=1") if sys.platform == "darwin" else ()),
        ):
            connection.execute(f"pragma {pragma}")
        version = connection.execute("pragma user_version").fetchone()[0]
        if version == 0:
            connection.executescript(f"begin; {_SCHEMA} pragma user_version={SCHEMA_VERSION}; commit;")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"{path} has index version {version}; this release reads {SCHEMA_VERSION}. Use the release that wrote it."
            )
    except sqlite3.DatabaseError as e:
        connection.close()
        raise StoreError(
            f"{path} is not a readable index ({e}); move it away to start with an empty memory"
        ) from e
    return Database(connection, execute_plugins=False)


class Index:
    """The rows of one fingerprint. Reads happen at start, writes on the writer thread."""

    def __init__(self, path: Path, fingerprint: str, *, durable: bool = True) -> None:
        self.db = connect(path, durable)
        self.fingerprint = fingerprint
        self._spaces: dict[str, int] = {}

    def close(self) -> None:
        self.db.close()

    def last_ids(self) -> dict[str, int]:
        """The highest id of every table whose ids are assigned by the engine."""
        query = "select coalesce(max(id), 0) from "
        return {
            t: self.db.execute(query + t).fetchone()[0] for t in ("pages", "extents", "agents", "sessions")
        }

    def namespaces(self) -> list[str]:
        rows = self.db.query("select namespace from spaces where fingerprint = ?", [self.fingerprint])
        return [r["namespace"] for r in rows]

    def extents(self) -> Iterator[ExtentRow]:
        """All extents, those of other fingerprints too."""
        for r in self.db.query("select id, name, bytes from extents"):
            yield ExtentRow(r["id"], r["name"], r["bytes"])

    def pages(self, namespace: str) -> Iterator[tuple[int, int | None, bool, np.ndarray, tuple[Piece, ...]]]:
        """(id, parent id, raw, tokens, pieces) of a namespace, parents before children (ids grow)."""
        space = self._space(namespace)
        pieces: dict[int, list[Piece]] = {}
        for r in self.db.query(
            "select pieces.* from pieces join pages on pages.id = page where space = ? order by page, page_row",
            [space],
        ):
            piece = Piece(r["extent"], bool(r["raw"]), r["extent_row"], r["page_row"], r["rows"])
            pieces.setdefault(r["page"], []).append(piece)
        for r in self.db.query(
            "select id, parent, raw, tokens from pages where space = ? order by id", [space]
        ):
            tokens = np.frombuffer(r["tokens"], dtype=np.int32)
            yield r["id"], r["parent"], bool(r["raw"]), tokens, tuple(pieces.get(r["id"], ()))

    def agents(self) -> Iterator[AgentRow]:
        for r in self.db.query("select * from agents"):
            yield AgentRow(
                r["id"], r["namespace"], r["name"], r["created"], r["last_used"], json.loads(r["totals"])
            )

    def sessions(self) -> Iterator[SessionRow]:
        """Every session with its turns. The head belongs to this fingerprint or is None (state of another one is no use)."""
        for s in self.db.query(
            "select sessions.*, spaces.fingerprint from sessions join spaces on spaces.id = space order by sessions.id"
        ):
            head = s["head"] if s["fingerprint"] == self.fingerprint else None
            row = SessionRow(s["id"], s["agent"], s["name"], head)
            for t in self.db.query("select * from turns where session = ? order by n", [s["id"]]):
                row.turns.append(_turn(t))
            yield row

    def commit(self, commit: TurnCommit) -> None:
        """Record a turn: one transaction, durable when it returns."""
        space = self._space(commit.agent.namespace)
        with self.db.atomic():
            run = self.db.conn.execute
            if commit.extent is not None:
                e = commit.extent
                run(
                    "insert into extents values (?, ?, ?, ?, ?)",
                    (e.id, e.name, space, e.bytes, commit.turn.created),
                )
            self._insert_pages(space, commit.pages)
            a, s = commit.agent, commit.session
            run(
                "insert into agents values (?, ?, ?, ?, ?, ?) on conflict (id) do update set last_used = excluded.last_used, "
                "totals = excluded.totals",
                (a.id, a.namespace, a.name, a.created, a.last_used, json.dumps(a.totals)),
            )
            head = commit.head.id if commit.head is not None else None
            run(
                "insert into sessions values (?, ?, ?, ?, ?) on conflict (id) do update set head = excluded.head, "
                "space = excluded.space",
                (s.id, a.id, s.name, space, head),
            )
            for t in (*commit.earlier, commit.turn):
                run(
                    "insert into turns values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (s.id, t.n, t.keep_tokens, t.keep_messages, t.ids.astype(np.int32).tobytes(),
                     json.dumps(t.spans), json.dumps(t.messages), json.dumps(t.stats), t.created),
                )  # fmt: skip
            self._delete_pages(commit.dropped)

    def _insert_pages(self, space: int, pages: list[tuple[Page, tuple[Piece, ...]]]) -> None:
        run = self.db.conn.execute
        for page, pieces in pages:
            parent = page.parent.id if page.parent is not None else None
            run(
                "insert or ignore into pages values (?, ?, ?, ?, ?)",
                (page.id, space, parent, int(page.raw), page.tokens.astype(np.int32).tobytes()),
            )
            for p in pieces:
                row = (page.id, p.page_row, p.extent, int(p.raw), p.extent_row, p.rows)
                run("insert or replace into pieces values (?, ?, ?, ?, ?, ?)", row)

    def _delete_pages(self, ids: Iterable[int]) -> None:
        for page in sorted(ids, reverse=True):
            self.db.conn.execute("delete from pages where id = ?", (page,))

    def forget(self, agent: int, pages: Iterable[int]) -> None:
        """Delete an agent, its sessions, its token log and the given pages."""
        with self.db.atomic():
            self.db.conn.execute("delete from agents where id = ?", (agent,))
            self._delete_pages(pages)

    def drop_pages(self, pages: Iterable[int], bare: Iterable[int], heads: dict[int, int | None]) -> None:
        """Delete pages whose rows are gone, and the rows' places of pages that live on in RAM (`bare`).

        `heads` gives sessions the page their state now ends with.
        """
        with self.db.atomic():
            for page in bare:
                self.db.conn.execute("delete from pieces where page = ?", (page,))
            for session, head in heads.items():
                self.db.conn.execute("update sessions set head = ? where id = ?", (head, session))
            self._delete_pages(pages)

    def unused_extents(self) -> list[ExtentRow]:
        """Extents that no page refers to any more."""
        query = "select id, name, bytes from extents where not exists (select 1 from pieces where extent = extents.id)"
        return [ExtentRow(r["id"], r["name"], r["bytes"]) for r in self.db.query(query)]

    def delete_extents(self, extents: Iterable[ExtentRow]) -> None:
        with self.db.atomic():
            for e in extents:
                self.db.conn.execute("delete from extents where id = ?", (e.id,))

    def checkpoint(self) -> None:
        """Fold the WAL into the index file and truncate it."""
        self.db.conn.execute("pragma wal_checkpoint(truncate)")

    def _space(self, namespace: str) -> int:
        if namespace not in self._spaces:
            key = (self.fingerprint, namespace)
            self.db.conn.execute("insert or ignore into spaces (fingerprint, namespace) values (?, ?)", key)
            row = self.db.conn.execute(
                "select id from spaces where fingerprint = ? and namespace = ?", key
            ).fetchone()
            self._spaces[namespace] = row[0]
        return self._spaces[namespace]


def _turn(t: dict[str, Any]) -> TurnRow:
    ids = np.frombuffer(t["ids"], dtype=np.int32)
    return TurnRow(t["n"], t["keep_tokens"], t["keep_messages"], ids, json.loads(t["spans"]),
                   json.loads(t["messages"]), json.loads(t["stats"]), t["created"])  # fmt: skip
