"""Responses and conversations that clients go on from: what was said in each, on disk or in RAM.

This is text, not state: what was computed from it lies in the store, and is found by content.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from agentmem.errors import NotFound, StoreError
from agentmem.home import private

log = logging.getLogger(__name__)

KEPT_S = 30 * 24 * 3600.0
"""How long a response can be gone on from, in seconds: as long as OpenAI keeps one."""
MOST = 20_000
"""Responses that are kept; the oldest go first."""
SCHEMA = """
create table if not exists responses (id text primary key, namespace text not null, agent text not null,
    session text not null, previous text, conversation text, created real not null, body text not null) without rowid;
create index if not exists responses_by_agent on responses (namespace, agent);
create index if not exists responses_by_age on responses (created);
create table if not exists conversations (id text primary key, namespace text not null, agent text, session text,
    created real not null, metadata text not null) without rowid;
create table if not exists items (owner text not null, n integer not null, id text not null, output integer not null,
    item text not null, primary key (owner, n)) without rowid;
"""

Items = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Kept:
    """A response: who spoke, what it followed, and its body as it was sent."""

    id: str
    namespace: str
    agent: str
    session: str
    previous: str | None
    conversation: str | None
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KeptConversation:
    """A conversation by its id; `agent` and `session` are known from its first response on."""

    id: str
    namespace: str
    agent: str | None
    session: str | None
    created: float
    metadata: dict[str, str]

    def as_openai(self) -> dict[str, Any]:
        """The object of the API."""
        return {
            "id": self.id,
            "object": "conversation",
            "created_at": int(self.created),
            "metadata": self.metadata,
        }


class KeptResponses:
    """One database. Thread-safe. Every method that looks something up raises NotFound for what is not there."""

    def __init__(self, path: Path | None) -> None:
        """`path` None: in RAM. A file that is damaged is put aside. Raises StoreError where there can be no file."""
        self._lock = threading.RLock()
        self._db = _opened(path) if path is not None else _memory()

    def close(self) -> None:
        """Nothing can be asked any more."""
        with self._lock:
            self._db.conn.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                with self._db.conn as connection:
                    yield connection
            except sqlite3.Error as error:
                raise StoreError(f"the response cannot be kept: {error}") from error

    def keep(self, response: Kept, given: Items, said: Items) -> None:
        """Add a response: the items that it was given and those that it said. What is too old goes."""
        row = (
            response.id, response.namespace, response.agent, response.session, response.previous,
            response.conversation, time.time(), json.dumps(response.body),
        )  # fmt: skip
        with self._writing() as connection:
            connection.execute("insert into responses values (?, ?, ?, ?, ?, ?, ?, ?)", row)
            _append(connection, response.id, [*((i, 0) for i in given), *((i, 1) for i in said)])
            if response.conversation is not None:
                _append(connection, response.conversation, [(i, 0) for i in [*given, *said]])
                connection.execute(
                    "update conversations set agent = ?, session = ? where id = ?",
                    (response.agent, response.session, response.conversation),
                )
            _prune(connection)

    def response(self, id_: str, namespace: str) -> Kept:
        """A response by its id."""
        row = self._one(
            "select id, namespace, agent, session, previous, conversation, body from responses where id = ? and namespace = ?",
            (id_, namespace),
        )
        if row is None:
            raise NotFound(
                f"there is no response {id_[:80]!r}", param="previous_response_id", code="response_not_found"
            )
        id_, namespace, agent, session, previous, conversation, body = row
        return Kept(id_, namespace, agent, session, previous, conversation, json.loads(body))

    def history(self, last: Kept) -> Items:
        """All items up to the end of a response: of its conversation's responses or those before it, the oldest first."""
        chain, one = [last], last
        while one.previous is not None:
            one = self.response(one.previous, one.namespace)
            chain.append(one)
        return [item for response in reversed(chain) for item in self.items(response.id)]

    def items(self, owner: str, *, given: bool = False) -> Items:
        """The items of a response or a conversation, in order; with `given` without those that a response said."""
        rows = self._all(
            f"select item from items where owner = ? {'and output = 0' if given else ''} order by n", (owner,)
        )
        return [json.loads(text) for (text,) in rows]

    def delete(self, id_: str, namespace: str) -> None:
        """Delete one response."""
        self.response(id_, namespace)
        with self._writing() as connection:
            connection.execute("delete from items where owner = ?", (id_,))
            connection.execute("delete from responses where id = ?", (id_,))

    def forget(self, namespace: str, agent: str, session: str | None = None) -> None:
        """Delete what an agent said, in all sessions or in one, and the conversations it was said in."""
        whose = (namespace, agent) if session is None else (namespace, agent, session)
        which = "namespace = ? and agent = ?" + ("" if session is None else " and session = ?")
        elsewhere = f"""select conversation from responses
            where {which} and conversation is not null and conversation not in (select id from conversations)"""
        with self._writing() as connection:
            # The conversation itself is on disk, also where what this agent said in it is in RAM.
            connection.execute(f"delete from items where owner in ({elsewhere})", whose)
            for table in ("responses", "conversations"):
                owned = f"select id from {table} where {which}"
                connection.execute(f"delete from items where owner in ({owned})", whose)
                connection.execute(f"delete from {table} where {which}", whose)

    def begin_conversation(self, one: KeptConversation, items: Items) -> None:
        """A new conversation."""
        row = (one.id, one.namespace, one.agent, one.session, one.created, json.dumps(one.metadata))
        with self._writing() as connection:
            connection.execute("insert into conversations values (?, ?, ?, ?, ?, ?)", row)
            _append(connection, one.id, [(item, 0) for item in items])

    def conversation(self, id_: str, namespace: str) -> KeptConversation:
        """A conversation by its id."""
        row = self._one(
            "select id, namespace, agent, session, created, metadata from conversations where id = ? and namespace = ?",
            (id_, namespace),
        )
        if row is None:
            raise NotFound(
                f"there is no conversation {id_[:80]!r}", param="conversation", code="conversation_not_found"
            )
        id_, namespace, agent, session, created, metadata = row
        return KeptConversation(id_, namespace, agent, session, created, json.loads(metadata))

    def describe(self, id_: str, metadata: dict[str, str]) -> None:
        """Give a conversation other metadata."""
        with self._writing() as connection:
            connection.execute(
                "update conversations set metadata = ? where id = ?", (json.dumps(metadata), id_)
            )

    def add_items(self, id_: str, items: Items) -> None:
        """Add to the end of a conversation."""
        with self._writing() as connection:
            _append(connection, id_, [(item, 0) for item in items])

    def delete_item(self, owner: str, id_: str) -> None:
        """Take one item out of a conversation."""
        with self._writing() as connection:
            if not connection.execute("delete from items where owner = ? and id = ?", (owner, id_)).rowcount:
                raise NotFound(f"there is no item {id_[:80]!r}", code="item_not_found")

    def delete_conversation(self, id_: str) -> None:
        """Delete a conversation; responses that were part of it stay."""
        with self._writing() as connection:
            connection.execute("delete from items where owner = ?", (id_,))
            connection.execute("delete from conversations where id = ?", (id_,))

    def _one(self, sql: str, values: tuple[Any, ...]) -> Any:
        with self._lock:
            return self._db.conn.execute(sql, values).fetchone()

    def _all(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        with self._lock:
            return self._db.conn.execute(sql, values).fetchall()


def _append(connection: sqlite3.Connection, owner: str, items: Iterable[tuple[dict[str, Any], int]]) -> None:
    (last,) = connection.execute("select coalesce(max(n), 0) from items where owner = ?", (owner,)).fetchone()
    connection.executemany(
        "insert into items values (?, ?, ?, ?, ?)",
        [
            (owner, last + 1 + i, item["id"], output, json.dumps(item))
            for i, (item, output) in enumerate(items)
        ],
    )


def _prune(connection: sqlite3.Connection) -> None:
    old = "select id from responses where created < ?"
    most = f"select id from responses order by created desc limit -1 offset {MOST}"
    found = connection.execute(f"{old} union select id from ({most})", (time.time() - KEPT_S,)).fetchall()
    connection.executemany("delete from items where owner = ?", found)
    connection.executemany("delete from responses where id = ?", found)


def _memory() -> Database:
    database = Database(sqlite3.connect(":memory:", check_same_thread=False), execute_plugins=False)
    database.conn.executescript(SCHEMA)
    return database


def _opened(path: Path) -> Database:
    try:
        return _connected(path)
    except sqlite3.DatabaseError as error:
        aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
        log.warning("%s is damaged (%s); put aside as %s", path, error, aside.name)
        path.rename(aside)
        for part in ("-wal", "-shm"):
            path.with_name(path.name + part).unlink(missing_ok=True)
        return _connected(path)


def _connected(path: Path) -> Database:
    os.close(private(path, os.O_RDWR | os.O_CREAT))
    database = Database(sqlite3.connect(path, check_same_thread=False), execute_plugins=False)
    try:
        for pragma in ("journal_mode=wal", "synchronous=full", "secure_delete=on"):
            database.conn.execute(f"pragma {pragma}")
        if database.conn.execute("pragma quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("the integrity check failed")
        database.conn.executescript(SCHEMA)
        with database.conn as connection:
            _prune(connection)
    except BaseException:
        database.conn.close()
        raise
    return database
