"""The SQLite index: agents, sessions and the token log (primary), pages and where their rows lie (rebuildable from extents).

All writes happen on the writer thread, one transaction per commit, after the extent is durable.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.rows import (
    AgentRow,
    ExtentRow,
    SessionRow,
    TurnCommit,
    TurnRow,
    agent_columns,
    agent_row,
    pack,
    page_sum,
    piece_sum,
    row_sum,
    turn_columns,
    turn_row,
)
from agentmem.blockpool.schema import SCHEMA_VERSION, connect

__all__ = ["SCHEMA_VERSION", "AgentRow", "ExtentRow", "Index", "SessionRow", "TurnCommit", "TurnRow"]

PageColumns = tuple[int, int | None, bool, np.ndarray, tuple[Piece, ...]]


class Index:
    """The rows of one fingerprint. Reads happen at start, writes on the writer thread.

    Readers leave out rows whose checksum is wrong and what depends on them, and count them in `damaged`. `text_identity` is
    the hash of tokenizer and chat template.
    """

    def __init__(
        self, path: Path, fingerprint: str, text_identity: str = "", *, durable: bool = True
    ) -> None:
        self.db = connect(path, durable)
        self.fingerprint = fingerprint
        self.text_identity = text_identity
        self.damaged = 0
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

    def _sound(self, table: str, columns: tuple[Any, ...], total: int) -> bool:
        if row_sum(table, columns) == total:
            return True
        self.damaged += 1
        return False

    def extents(self) -> Iterator[ExtentRow]:
        """All extents, those of other fingerprints too."""
        for *columns, total in self.db.execute("select id, name, space, bytes, created, sum from extents"):
            if self._sound("extents", tuple(columns), total):
                yield ExtentRow(columns[0], columns[1], columns[3])

    def pages(self, namespace: str) -> Iterator[PageColumns]:
        """(id, parent id, raw, tokens, pieces) of a namespace, parents before children (ids grow)."""
        space = self._find_space(namespace)
        pieces = self._pieces()
        seen: set[int] = set()
        for id_, parent, raw, tokens, total in self.db.execute(
            "select id, parent, raw, tokens, sum from pages where space = ? order by id", [space]
        ):
            if page_sum(id_, space, parent, raw, tokens) != total or (
                parent is not None and parent not in seen
            ):
                self.damaged += 1
                continue
            seen.add(id_)
            yield id_, parent, bool(raw), np.frombuffer(tokens, dtype=np.int32), pieces.get(id_, ())

    def _pieces(self) -> dict[int, tuple[Piece, ...]]:
        """The pieces of every page, of all spaces."""
        found: dict[int, tuple[Piece, ...]] = {}
        for page, page_row, extent, raw, extent_row, rows, total in self.db.execute(
            "select page, page_row, extent, raw, extent_row, rows, sum from pieces order by page, page_row"
        ):
            if piece_sum(page, page_row, extent, raw, extent_row, rows) != total:
                self.damaged += 1
                continue
            piece = Piece(extent, bool(raw), extent_row, page_row, rows)
            found[page] = (*found[page], piece) if page in found else (piece,)
        return found

    def agents(self) -> Iterator[AgentRow]:
        for *columns, total in self.db.execute("select * from agents"):
            if self._sound("agents", tuple(columns), total):
                yield agent_row(columns)

    def sessions(self) -> Iterator[SessionRow]:
        """Every session with its turns, base before fork.

        The head belongs to this fingerprint or is None (state of another one is no use). Turns behind a lost one are left out.
        """
        turns = self._turns()
        known: dict[int, SessionRow] = {}
        texts = dict(self.db.execute("select id, text from spaces"))
        spaces = {self._find_space(n) for n in self.namespaces()}
        for *columns, total in self.db.execute("select * from sessions order by id"):
            if not self._sound("sessions", tuple(columns), total):
                continue
            id_, agent, name, space, head, base, base_turn = columns
            text = texts.get(space) == self.text_identity
            row = SessionRow(id_, agent, name, head if space in spaces else None, base, base_turn, text)
            inherited = known[base].turns if base in known else []
            row.turns = [t for t in inherited if t.n <= base_turn]
            for turn in turns.get(id_, []):
                if turn.n != len(row.turns) + 1:
                    self.damaged += 1
                    break
                row.turns.append(turn)
            known[id_] = row
            yield row

    def _turns(self) -> dict[int, list[TurnRow]]:
        def sound() -> Iterator[tuple[int, TurnRow]]:
            for *columns, total in self.db.execute("select * from turns order by session, n"):
                if self._sound("turns", tuple(columns), total):
                    yield columns[0], turn_row(columns)

        return {s: [t for _, t in group] for s, group in groupby(sound(), key=lambda t: t[0])}

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """One transaction; durable when it ends."""
        spaces = dict(self._spaces)
        try:
            with self.db.atomic():
                yield self.db.conn.execute
        except BaseException:
            self._spaces = spaces
            raise

    def commit(self, commit: TurnCommit) -> None:
        """Record a turn: one transaction, durable when it returns."""
        with self._transaction():
            space = self._space(commit.agent.space)
            if commit.extent is not None:
                self._insert_extent(commit.extent, space, commit.turn.created)
            self._insert_pages(space, commit.pages)
            self._put_agent(commit.agent)
            self._put_session(commit.session, space, commit.head.id if commit.head is not None else None)
            for turn in (*commit.earlier, commit.turn):
                self._put_turn(commit.agent.id, turn_columns(commit.session.id, turn))
            self._delete_pages(commit.dropped)

    def update_agent(self, agent: AgentRow) -> None:
        """Record an agent's policy, lineage, counters and time of last use."""
        with self._transaction():
            self._put_agent(agent)

    def fork(self, agent: AgentRow, session: SessionRow, head: int | None) -> None:
        """Record a session that begins as another's turns up to `session.base_turn`, and its agent where it is new."""
        with self._transaction():
            self._put_agent(agent)
            self._put_session(session, self._space(agent.space), head)

    def adopt(
        self,
        agent: AgentRow,
        sessions: list[tuple[SessionRow, int | None]],
        pages: list[tuple[Page, tuple[Piece, ...]]],
        extent: ExtentRow | None,
        replaced: int | None,
    ) -> None:
        """Record a whole agent: sessions (with the id of their last page), turns, pages, and the extent of their rows.

        The agent `replaced` is deleted in the same transaction; its pages stay.
        """
        with self._transaction():
            if replaced is not None:
                self._forget_agent(replaced)
            space = self._space(agent.space)
            if extent is not None:
                self._insert_extent(extent, space, agent.last_used)
            self._insert_pages(space, pages)
            self._put_agent(agent)
            for session, head in sessions:
                self._put_session(session, space, head)
                for turn in session.turns:
                    self._put_turn(agent.id, turn_columns(session.id, turn))

    def move_pieces(
        self, extent: ExtentRow, namespace: str, moved: list[tuple[int, tuple[Piece, ...]]]
    ) -> None:
        """The rows of these pages lie in `extent` now. Pages that are gone meanwhile are passed over."""
        with self._transaction() as run:
            self._insert_extent(extent, self._space(namespace), time.time())
            for page, pieces in moved:
                if run("select 1 from pages where id = ?", (page,)).fetchone() is not None:
                    run("delete from pieces where page = ?", (page,))
                    self._insert_pieces(page, pieces)

    def _insert_extent(self, extent: ExtentRow, space: int, created: float) -> None:
        columns = (extent.id, extent.name, space, extent.bytes, float(created))
        total = row_sum("extents", columns)
        self.db.conn.execute("insert into extents values (?, ?, ?, ?, ?, ?)", (*columns, total))

    def _insert_pages(self, space: int, pages: list[tuple[Page, tuple[Piece, ...]]]) -> None:
        for page, pieces in pages:
            assert page.id is not None
            parent = page.parent.id if page.parent is not None else None
            columns = (page.id, space, parent, int(page.raw), page.tokens.astype("<i4").tobytes())
            self.db.conn.execute(
                "insert or ignore into pages values (?, ?, ?, ?, ?, ?)", (*columns, page_sum(*columns))
            )
            self._insert_pieces(page.id, pieces)

    def _insert_pieces(self, page: int, pieces: tuple[Piece, ...]) -> None:
        for p in pieces:
            columns = (page, p.page_row, p.extent, int(p.raw), p.extent_row, p.rows)
            self.db.conn.execute(
                "insert or replace into pieces values (?, ?, ?, ?, ?, ?, ?)", (*columns, piece_sum(*columns))
            )

    def _put_agent(self, agent: AgentRow) -> None:
        columns = agent_columns(agent)
        self.db.conn.execute(
            "insert into agents values (?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict (id) do update set "
            "last_used = excluded.last_used, totals = excluded.totals, policy = excluded.policy, lineage = excluded.lineage, sum = excluded.sum",
            (*columns, row_sum("agents", columns)),
        )
        self._put_copy(agent.id, 0, 0, columns)

    def _put_session(self, session: SessionRow, space: int, head: int | None) -> None:
        """Insert the session, or give it another head. What it is based on does not change here: see `forget`."""
        run = self.db.conn.execute
        known = run("select base, base_turn from sessions where id = ?", (session.id,)).fetchone()
        base, base_turn = known or (session.base, session.base_turn)
        columns = (session.id, session.agent, session.name, space, head, base, base_turn)
        run(
            "insert into sessions values (?, ?, ?, ?, ?, ?, ?, ?) on conflict (id) do update set space = excluded.space, "
            "head = excluded.head, base = excluded.base, base_turn = excluded.base_turn, sum = excluded.sum",
            (*columns, row_sum("sessions", columns)),
        )
        place = run("select fingerprint, namespace, text from spaces where id = ?", (space,)).fetchone()
        self._put_copy(session.agent, session.id, 0, (*columns[:3], *place, base, base_turn))

    def _put_turn(self, agent: int, columns: tuple[Any, ...]) -> None:
        total = row_sum("turns", columns)
        self.db.conn.execute("insert into turns values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*columns, total))
        self._put_copy(agent, columns[0], columns[1], columns)

    def _put_copy(self, agent: int, session: int, n: int, columns: tuple[Any, ...]) -> None:
        """The second copy of a row that nothing else could restore: an agent (0, 0), a session (id, 0), a turn (session, n)."""
        key = (agent, session, n, pack(columns))
        self.db.conn.execute(
            "insert or replace into copies values (?, ?, ?, ?, ?)", (*key, row_sum("copies", key))
        )

    def _delete_pages(self, ids: Iterable[int]) -> None:
        run = self.db.conn.execute
        for page in sorted(ids, reverse=True):
            for (session,) in run("select id from sessions where head = ?", (page,)).fetchall():
                self._move_head(session, None)
            run("delete from pages where id = ?", (page,))

    def _move_head(self, session: int, head: int | None) -> None:
        run = self.db.conn.execute
        row = run(
            "select id, agent, name, space, base, base_turn from sessions where id = ?", (session,)
        ).fetchone()
        if row is not None:
            total = row_sum("sessions", (*row[:4], head, *row[4:]))
            run("update sessions set head = ?, sum = ? where id = ?", (head, total, session))

    def forget(self, agent: int, pages: Iterable[int]) -> None:
        """Delete an agent, its sessions, its token log and the given pages. Forks get the turns that they were based on."""
        with self._transaction():
            self._forget_agent(agent)
            self._delete_pages(pages)

    def _forget_agent(self, agent: int) -> None:
        run = self.db.conn.execute
        while fork := run(
            "select f.id, f.agent, f.base_turn, b.id, b.base, b.base_turn from sessions f join sessions b on b.id = f.base "
            "where b.agent = ? and f.agent != ? limit 1",
            (agent, agent),
        ).fetchone():
            self._rebase(*fork)
        run("delete from agents where id = ?", (agent,))

    def _rebase(
        self, fork: int, agent: int, turns: int, base: int, next_base: int | None, next_turns: int
    ) -> None:
        """Base a fork on what its base is based on: the turns that lie between become its own."""
        run = self.db.conn.execute
        own = run(
            "select * from turns where session = ? and n <= ? and n > ? order by n", (base, turns, next_turns)
        ).fetchall()
        for row in own:
            self._put_turn(agent, (fork, *row[1:-1]))
        _, _, name, space, head, *_ = run("select * from sessions where id = ?", (fork,)).fetchone()
        run(
            "update sessions set base = ?, base_turn = ? where id = ?",
            (next_base, min(turns, next_turns), fork),
        )
        self._put_session(SessionRow(fork, agent, name, head), space, head)

    def drop_pages(self, pages: Iterable[int], bare: Iterable[int], heads: dict[int, int | None]) -> None:
        """Delete pages whose rows are gone, and the rows' places of pages that live on in RAM (`bare`).

        `heads` gives sessions the page their state now ends with.
        """
        with self._transaction() as run:
            for page in bare:
                run("delete from pieces where page = ?", (page,))
            for session, head in heads.items():
                self._move_head(session, head)
            self._delete_pages(pages)

    def unused_extents(self) -> list[ExtentRow]:
        """Extents that no page refers to any more."""
        query = "select id, name, bytes from extents where not exists (select 1 from pieces where extent = extents.id)"
        return [ExtentRow(r["id"], r["name"], r["bytes"]) for r in self.db.query(query)]

    def delete_extents(self, extents: Iterable[ExtentRow]) -> None:
        with self._transaction() as run:
            for e in extents:
                run("delete from extents where id = ?", (e.id,))

    def checkpoint(self) -> None:
        """Fold the WAL into the index file and truncate it."""
        self.db.conn.execute("pragma wal_checkpoint(truncate)")

    def _find_space(self, namespace: str) -> int:
        """The id of this fingerprint's space of a namespace; -1 when there is none."""
        row = self.db.execute(
            "select id from spaces where fingerprint = ? and namespace = ?", [self.fingerprint, namespace]
        ).fetchone()
        return row[0] if row is not None else -1

    def _space(self, namespace: str) -> int:
        """The same, made where there is none. Within a transaction."""
        if namespace not in self._spaces:
            self.db.conn.execute(
                "insert or ignore into spaces (fingerprint, namespace, text) values (?, ?, ?)",
                (self.fingerprint, namespace, self.text_identity),
            )
            self._spaces[namespace] = self._find_space(namespace)
        return self._spaces[namespace]
