"""The SQLite index: agents, sessions and the token log (primary), pages and where their rows lie (rebuildable from extents).

All writes happen on the writer thread, one transaction per commit, after the extent is durable.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentmem.blockpool.failpoint import failpoint
from agentmem.blockpool.lookup import PAGE_LABEL, Lookup
from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.rows import (
    AgentRow,
    ExtentRow,
    SessionRow,
    TurnCommit,
    TurnRow,
    agent_columns,
    pack,
    page_sum,
    piece_sum,
    row_sum,
    seal_turn,
    turn_columns,
)
from agentmem.blockpool.schema import SCHEMA_VERSION
from agentmem.blockpool.vault import Seal, Vaults

__all__ = ["SCHEMA_VERSION", "AgentRow", "ExtentRow", "Index", "SessionRow", "TurnCommit", "TurnRow"]


class Index(Lookup):
    """The rows of one fingerprint. Reads happen at start (see `Lookup`), writes on the writer thread."""

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        text_identity: str = "",
        *,
        durable: bool = True,
        vaults: Vaults | None = None,
    ) -> None:
        super().__init__(path, fingerprint, text_identity, durable=durable, vaults=vaults)
        self._spaces: dict[str, int] = {}

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """One transaction; durable when it ends."""
        spaces = dict(self._spaces)
        self._checked.clear()
        try:
            failpoint("index.begin")
            with self.db.atomic():
                yield self.db.conn.execute
                failpoint("index.changed")
            failpoint("index.committed")
        except BaseException:
            self._spaces = spaces
            raise

    def commit(self, commit: TurnCommit) -> None:
        """Record a turn: one transaction, durable when it returns."""
        with self._transaction():
            space, seal = self._space(commit.agent.space), self._seal(commit.agent.space)
            if commit.extent is not None:
                self._insert_extent(commit.extent, space, commit.turn.created)
            self._insert_pages(space, commit.pages, seal)
            self._put_agent(commit.agent)
            self._put_session(commit.session, space, commit.head.id if commit.head is not None else None)
            for turn in (*commit.earlier, commit.turn):
                self._put_turn(commit.agent.id, _columns(commit.session.id, turn, seal))
            self._delete_pages(commit.dropped)

    def update_agent(self, agent: AgentRow) -> None:
        """Record an agent's policy, lineage, counters and time of last use."""
        if self.vaults is not None:
            self.vaults.keep(agent.space)
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
            seal = (
                self._seal(agent.space)
                if pages or any(not t.sealed for s, _ in sessions for t in s.turns)
                else None
            )
            if extent is not None:
                self._insert_extent(extent, space, agent.last_used)
            self._insert_pages(space, pages, seal)
            self._put_agent(agent)
            for session, head in sessions:
                self._put_session(session, space, head)
                for turn in session.turns:
                    self._put_turn(agent.id, _columns(session.id, turn, seal))

    def add_pages(
        self, space: str, pages: list[tuple[Page, tuple[Piece, ...]]], extents: list[ExtentRow]
    ) -> None:
        """Record pages and the extents of their rows, as they are found when the index is rebuilt."""
        with self._transaction():
            number = self._space(space)
            for extent in extents:
                self._insert_extent(extent, number, time.time())
            self._insert_pages(number, pages, self._seal(space) if pages else None)

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

    def _insert_pages(
        self, space: int, pages: list[tuple[Page, tuple[Piece, ...]]], seal: Seal | None
    ) -> None:
        for page, pieces in pages:
            assert page.id is not None
            parent = page.parent.id if page.parent is not None else None
            tokens = page.tokens.astype("<i4").tobytes()
            tokens = tokens if seal is None else seal.seal(tokens, PAGE_LABEL)
            columns = (page.id, space, parent, int(page.raw), tokens)
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
            "last_used = excluded.last_used, totals = excluded.totals, policy = excluded.policy, "
            "lineage = excluded.lineage, sum = excluded.sum",
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

    def forget(self, agent: int, pages: Iterable[int], sessions: Iterable[int] | None = None) -> None:
        """Delete an agent, or these `sessions` of it, with their token log, and the given pages.

        Forks get the turns that they were based on.
        """
        with self._transaction():
            if sessions is None:
                self._forget_agent(agent)
            for session in sessions or ():
                self._forget_session(agent, session)
            self._delete_pages(pages)

    def _forget_session(self, agent: int, session: int) -> None:
        run = self.db.conn.execute
        while fork := run(
            "select f.id, f.agent, f.base_turn, b.id, b.base, b.base_turn from sessions f "
            "join sessions b on b.id = f.base where b.id = ? limit 1",
            (session,),
        ).fetchone():
            self._rebase(*fork)
        run("delete from copies where agent = ? and session = ?", (agent, session))
        run("delete from sessions where id = ?", (session,))

    def _forget_agent(self, agent: int) -> None:
        run = self.db.conn.execute
        while fork := run(
            "select f.id, f.agent, f.base_turn, b.id, b.base, b.base_turn from sessions f join sessions b on b.id = f.base "
            "where b.agent = ? and f.agent != ? limit 1",
            (agent, agent),
        ).fetchone():
            self._rebase(*fork)
        run("delete from agents where id = ?", (agent,))
        # Spaces of single agents end with the last of them; those that are locked have no pages that the engine could name.
        for (space,) in run(
            "select id from spaces where (instr(namespace, '#') or instr(namespace, '!')) "
            "and id not in (select space from sessions)"
        ).fetchall():
            run("delete from pages where space = ?", (space,))

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

    def foreign_pages(self, need: int) -> list[int]:
        """Pages of other fingerprints in the oldest extents of `need` bytes together, and all pages behind them."""
        rows = self.db.query(
            "select e.id, e.bytes from extents e join spaces s on s.id = e.space where s.fingerprint != ? order by e.created",
            [self.fingerprint],
        )
        chosen, size = [], 0
        for row in rows:
            if size >= need:
                break
            chosen.append(row["id"])
            size += row["bytes"]
        behind = (
            "with recursive gone(id) as (select page from pieces where extent in (select value from json_each(?)) "
            "union select pages.id from pages join gone on parent = gone.id) select id from gone"
        )
        return [r["id"] for r in self.db.query(behind, [json.dumps(chosen)])]

    def delete_extents(self, extents: Iterable[ExtentRow]) -> None:
        """Delete extents that no page refers to."""
        checked = {name: rows for name, rows in self._checked.items() if name != "extents"}
        with self._transaction() as run:
            for e in extents:
                run("delete from extents where id = ?", (e.id,))
        self._checked = checked

    def checkpoint(self) -> None:
        """Fold the WAL into the index file and truncate it."""
        self.db.conn.execute("pragma wal_checkpoint(truncate)")

    def _space(self, namespace: str) -> int:
        """The same, made where there is none. Within a transaction."""
        if namespace not in self._spaces:
            space = self._find_space(namespace)
            if space < 0:
                space = self.db.execute("select coalesce(max(id), 0) + 1 from spaces").fetchone()[0]
                columns = (space, self.fingerprint, namespace, self.text_identity)
                self.db.conn.execute(
                    "insert into spaces values (?, ?, ?, ?, ?)", (*columns, row_sum("spaces", columns))
                )
            self._spaces[namespace] = space
        return self._spaces[namespace]


def _columns(session: int, turn: TurnRow, seal: Seal | None) -> tuple[Any, ...]:
    return turn_columns(session, turn if seal is None else seal_turn(turn, seal))
