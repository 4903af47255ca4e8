"""The read side of the index: what it says at start, row by row, every row checked against its sum."""

from __future__ import annotations

import gc
import logging
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agentmem.blockpool.page import Piece
from agentmem.blockpool.rows import (
    AgentRow,
    ExtentRow,
    SessionRow,
    TurnRow,
    agent_row,
    open_turn,
    page_sum,
    piece_sum,
    row_sum,
    turn_row,
)
from agentmem.blockpool.schema import IndexDamaged, connect, is_damage
from agentmem.blockpool.vault import Locked, Seal, Vaults, vault_of

log = logging.getLogger(__name__)

PAGE_LABEL = b"page"

_PAIRED = """select (select count(*) from agents) = (select count(*) from copies where session = 0)
    and (select count(*) from sessions) = (select count(*) from copies where session > 0 and n = 0)
    and (select count(*) from turns) = (select count(*) from copies where n > 0)"""

T = TypeVar("T")
PageColumns = tuple[int, int | None, bool, np.ndarray, tuple[Piece, ...]]


def _structure(path: Path) -> str:
    """SQLite's own verdict on the file, "ok" or the first fault; on a connection of its own, because it takes a while."""
    connection = sqlite3.connect(path)
    try:
        return str(connection.execute("pragma integrity_check(1)").fetchone()[0])
    finally:
        connection.close()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without the cyclic garbage collector, which would look at all rows again and again while they are read."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Lookup:
    """An index that is open, and its readers. They are used at start, before anything is written.

    Readers leave out rows whose checksum is wrong and what depends on them, and count them in `damaged`. `text_identity` is
    the hash of tokenizer and chat template. Rows of sealed spaces are opened with the keys in `vaults`; a space whose key is not
    there is `locked`: it stays as it is, without pages, its sessions without a head.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        text_identity: str = "",
        *,
        durable: bool = True,
        vaults: Vaults | None = None,
    ) -> None:
        self.path = path
        self.db = connect(path, durable)
        self.fingerprint = fingerprint
        self.text_identity = text_identity
        self.damaged = 0
        self.vaults = vaults
        self.locked: dict[str, str] = {}
        self._checked: dict[str, list[Any]] = {}

    def check(self) -> None:
        """Raises IndexDamaged when the file's structure or any row is not as it was written.

        Reads everything once; the first call of each reader afterwards takes what was read.
        """
        try:
            with collector_paused():
                self._checked = self._read_all()
        except (sqlite3.DatabaseError, ValueError, TypeError, struct.error) as e:
            if isinstance(e, sqlite3.DatabaseError) and not is_damage(e):
                raise
            raise IndexDamaged(str(e)) from e
        if self.damaged:
            raise IndexDamaged(f"{self.damaged} rows are not as they were written")

    def _read_all(self) -> dict[str, list[Any]]:
        with ThreadPoolExecutor(1, thread_name_prefix="index-check") as beside:
            verdict = beside.submit(_structure, self.path)
            read = self._read_rows()
        if verdict.result() != "ok":
            raise IndexDamaged(verdict.result())
        return read

    def _read_rows(self) -> dict[str, list[Any]]:
        if not self.db.execute(_PAIRED).fetchone()[0]:
            raise IndexDamaged("rows and their copies do not go together")
        read: dict[str, list[Any]] = {
            "extents": list(self.extents()),
            "agents": list(self.agents()),
            "sessions": list(self.sessions()),
            **{f"pages {n}": list(self.pages(n)) for n in self.namespaces()},
        }
        pages = {p[0] for name, rows in read.items() if name.startswith("pages ") for p in rows}
        if any(s.head is not None and s.head not in pages for s in read["sessions"]):
            raise IndexDamaged("a session ends in a page that is not there")
        return read

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
        return self._once("extents", self._read_extents)

    def pages(self, namespace: str) -> Iterator[PageColumns]:
        """(id, parent id, raw, tokens, pieces) of a namespace, parents before children (ids grow)."""
        return self._once(f"pages {namespace}", lambda: self._read_pages(namespace))

    def agents(self) -> Iterator[AgentRow]:
        return self._once("agents", self._read_agents)

    def sessions(self) -> Iterator[SessionRow]:
        """Every session with its turns, base before fork.

        The head belongs to this fingerprint or is None (state of another one is no use). Turns behind a lost one are left out.
        """
        return self._once("sessions", self._read_sessions)

    def _once(self, name: str, read: Callable[[], Iterator[T]]) -> Iterator[T]:
        """What the check has read, the first time; later it may have changed."""
        return iter(self._checked.pop(name)) if name in self._checked else read()

    def _read_extents(self) -> Iterator[ExtentRow]:
        for *columns, total in self.db.execute("select id, name, space, bytes, created, sum from extents"):
            if self._sound("extents", tuple(columns), total):
                yield ExtentRow(columns[0], columns[1], columns[3])

    def _read_pages(self, namespace: str) -> Iterator[PageColumns]:
        space = self._find_space(namespace)
        try:
            seal = self._seal(namespace)
        except Locked:
            return
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
            if seal is not None:
                try:
                    tokens = seal.open(tokens, PAGE_LABEL)
                except Locked as e:
                    self._lock(namespace, e)
                    return
            seen.add(id_)
            yield id_, parent, bool(raw), np.frombuffer(tokens, dtype=np.int32), pieces.get(id_, ())

    def _seal(self, space: str) -> Seal | None:
        """What opens the rows of a space; None for plain ones. Raises Locked."""
        if vault_of(space) is None:
            return None
        try:
            if space in self.locked:
                raise Locked(self.locked[space])
            if self.vaults is None:
                raise Locked("there are no keys here")
            return self.vaults.seal(space)
        except Locked as e:
            self._lock(space, e)
            raise

    def _lock(self, space: str, reason: Locked) -> None:
        if space not in self.locked:
            self.locked[space] = str(reason)
            log.warning("%s is locked and left as it is: %s", space, reason)

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

    def _read_agents(self) -> Iterator[AgentRow]:
        for *columns, total in self.db.execute("select * from agents"):
            if self._sound("agents", tuple(columns), total):
                yield agent_row(columns)

    def _read_sessions(self) -> Iterator[SessionRow]:
        turns = self._turns()
        known: dict[int, SessionRow] = {}
        texts, names = self._texts()
        own_spaces = {self._find_space(n) for n in self.namespaces()}
        spaces = {i for i in own_spaces if names.get(i) not in self.locked}
        for *columns, total in self.db.execute("select * from sessions order by id"):
            if not self._sound("sessions", tuple(columns), total):
                continue
            id_, agent, name, space, head, base, base_turn = columns
            text = texts.get(space) == self.text_identity
            row = SessionRow(id_, agent, name, head if space in spaces else None, base, base_turn, text)
            row.foreign = head is not None and space in names and space not in own_spaces
            own = self._opened(turns.get(id_, []), names.get(space, ""), row)
            inherited = known[base].turns if base in known else []
            row.turns = [t for t in inherited if t.n <= base_turn]
            for turn in own:
                if turn.n != len(row.turns) + 1:
                    self.damaged += 1
                    break
                row.turns.append(turn)
            known[id_] = row
            yield row

    def _opened(self, turns: list[TurnRow], space: str, row: SessionRow) -> list[TurnRow]:
        """The turns of a session in plain text, or as they are when they are locked."""
        try:
            seal = self._seal(space)
            return [open_turn(t, seal) for t in turns] if seal is not None else turns
        except (Locked, ValueError, zlib.error) as e:
            self._lock(space, Locked(str(e)))
            row.locked, row.head = True, None
            return turns

    def _texts(self) -> tuple[dict[int, str], dict[int, str]]:
        """The text identity and the name of every space."""
        rows = self.db.execute("select * from spaces").fetchall()
        sound = [r for r in rows if self._sound("spaces", r[:-1], r[-1])]
        return {r[0]: r[3] for r in sound}, {r[0]: r[2] for r in sound}

    def _turns(self) -> dict[int, list[TurnRow]]:
        def sound() -> Iterator[tuple[int, TurnRow]]:
            for *columns, total in self.db.execute("select * from turns order by session, n"):
                if self._sound("turns", tuple(columns), total):
                    yield columns[0], turn_row(columns)

        return {s: [t for _, t in group] for s, group in groupby(sound(), key=lambda t: t[0])}

    def _find_space(self, namespace: str) -> int:
        """The id of this fingerprint's space of a namespace; -1 when there is none."""
        row = self.db.execute(
            "select id from spaces where fingerprint = ? and namespace = ?", [self.fingerprint, namespace]
        ).fetchone()
        return row[0] if row is not None else -1
