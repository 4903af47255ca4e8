"""The index file: its tables, and opening it without trusting what lies there."""

from __future__ import annotations

import os
import sqlite3
import stat
import struct
import sys
from pathlib import Path

from sqlite_utils import Database

from agentmem.blockpool.carve import FILE_HEADER
from agentmem.blockpool.files import why_not
from agentmem.blockpool.wal import PAGE_SIZE, read_log
from agentmem.errors import StoreError

WAL_BYTES = 1 << 20
SCHEMA_VERSION = 2
_MAGIC = b"SQLite format 3\0"

SCHEMA = """
create table spaces (id integer primary key, fingerprint text not null, namespace text not null, text text not null,
    sum integer not null, unique (fingerprint, namespace));
create table extents (id integer primary key, name text not null unique, space integer not null references spaces,
    bytes integer not null, created real not null, sum integer not null);
create table pages (id integer primary key, space integer not null references spaces, parent integer references pages,
    raw integer not null, tokens blob not null, sum integer not null);
create index pages_parent on pages (parent);
create table pieces (page integer not null references pages on delete cascade, page_row integer not null,
    extent integer not null references extents, raw integer not null, extent_row integer not null, rows integer not null,
    sum integer not null, primary key (page, page_row)) without rowid;
create index pieces_extent on pieces (extent);
create table agents (id integer primary key, namespace text not null, name text not null, created real not null,
    last_used real not null, totals text not null default '{}', policy text not null default '{}',
    lineage text not null default '{}', sum integer not null, unique (namespace, name));
create table sessions (id integer primary key, agent integer not null references agents on delete cascade, name text not null,
    space integer not null references spaces, head integer references pages, base integer references sessions,
    base_turn integer not null default 0, sum integer not null, unique (agent, name));
create index sessions_head on sessions (head);
create table turns (session integer not null references sessions on delete cascade, n integer not null,
    keep_tokens integer not null, keep_messages integer not null,
    ids blob not null, spans text not null, messages text not null, stats text not null, created real not null,
    sum integer not null, primary key (session, n));
create table copies (agent integer not null references agents on delete cascade, session integer not null, n integer not null,
    data blob not null, sum integer not null, primary key (agent, session, n));
"""


class IndexDamaged(Exception):
    """The index file is not what was written: not a database, broken inside, or with rows whose sums are wrong."""


# What SQLite reports for bytes that are not as it wrote them, or (ERROR) for tables that are not ours.
_DAMAGE = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_SCHEMA,
}


def is_damage(error: Exception) -> bool:
    """Whether an error tells of damaged content (rather than of a full disk, a lock or a failing drive)."""
    if not isinstance(error, sqlite3.DatabaseError):
        return isinstance(error, IndexDamaged)
    code = getattr(error, "sqlite_errorcode", None)
    return code is None or code & 0xFF in _DAMAGE


def connect(path: Path, durable: bool) -> Database:
    """Open (or create) the index in WAL mode.

    Raises IndexDamaged when it is not readable, StoreError when another release wrote it or the file cannot be used.
    """
    _check_header(path)
    _check_log(path.with_name(f"{path.name}-wal"))
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for pragma in (
            f"page_size={PAGE_SIZE}",
            "journal_mode=wal",
            f"wal_autocheckpoint={WAL_BYTES // PAGE_SIZE}",
            f"journal_size_limit={WAL_BYTES}",
            f"synchronous={'full' if durable else 'off'}",
            "foreign_keys=on",
            "secure_delete=on",
            *(("fullfsync=1", "checkpoint_fullfsync=1") if sys.platform == "darwin" else ()),
        ):
            connection.execute(f"pragma {pragma}")
        _check_version(connection, path)
    except (sqlite3.DatabaseError, UnicodeError) as e:  # a message may quote what is no text any more
        connection.close()
        if isinstance(e, UnicodeError) or is_damage(e):
            raise IndexDamaged(str(e)) from e
        raise StoreError(f"{path} cannot be opened: {why_not(e)}") from e
    except BaseException:
        connection.close()
        raise
    return Database(connection, execute_plugins=False)


def _check_header(path: Path) -> None:
    """Make the file where there is none, for its owner alone; see damage that would make SQLite take it for another kind of file.

    With a wrong mode byte it would pass over the write-ahead log.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise IndexDamaged("not a regular file")
        header = os.pread(fd, FILE_HEADER, 0)
    finally:
        os.close(fd)
    if not header:
        return
    size, write, read, reserved, *fractions = struct.unpack_from(">H6B", header.ljust(FILE_HEADER, b"\0"), 16)
    if not header.startswith(_MAGIC) or (size, reserved, *fractions) != (PAGE_SIZE, 0, 64, 32, 32):
        raise IndexDamaged("not a database")
    if (write, read) not in ((1, 1), (2, 2)):
        raise IndexDamaged(f"unknown modes {write} and {read}")


def _check_log(path: Path) -> None:
    """See damage that would make SQLite pass over finished transactions."""
    try:
        log = read_log(path.read_bytes())
    except FileNotFoundError:
        return
    if log is not None and log.damaged:
        raise IndexDamaged("the write-ahead log is damaged")


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    """Create the tables in an empty file; refuse those of another release; see damage to the version or to the tables."""
    version = connection.execute("pragma user_version").fetchone()[0]
    tables = _tables(connection)
    if version == 0 and not tables:
        connection.executescript(f"begin; {SCHEMA} pragma user_version={SCHEMA_VERSION}; commit;")
    elif tables == _OWN_TABLES and version != SCHEMA_VERSION:
        raise IndexDamaged(f"the version says {version}, the tables are those of {SCHEMA_VERSION}")
    elif version == SCHEMA_VERSION and tables != _OWN_TABLES:
        raise IndexDamaged("its tables are not those of an index")
    elif version != SCHEMA_VERSION:
        raise StoreError(
            f"{path} has index version {version}; this release reads {SCHEMA_VERSION}. Use the release that wrote it."
        )


def _tables(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(connection.execute("select name, coalesce(sql, '') from sqlite_master"))


def _own_tables() -> set[tuple[str, str]]:
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(SCHEMA)
        return _tables(connection)
    finally:
        connection.close()


_OWN_TABLES = _own_tables()
