"""The keep: keepsakes of one fingerprint on disk, within a budget, beside the store of exact state and apart from it.

    keep.sqlite     which keepsakes there are, and notes      items/     one file each      aside/     damaged files

Everything in it can be made again: what is damaged is put aside or begun anew, never used. `apply` runs on the writer thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from agentmem.blockpool.failpoint import failpoint
from agentmem.blockpool.files import TEMPORARY, Files, is_disk_full
from agentmem.blockpool.keepsake import SUFFIX, Keepsake, KeepsakeDamaged, read_keepsake, write_keepsake

log = logging.getLogger(__name__)

INDEX = "keep.sqlite"
VERSION = 1
MARGIN = 4096
"""Bytes that a header may take: budgets hold for whole files."""
_SCHEMA = """
create table items (key text primary key, name text not null unique, fingerprint text not null, bytes integer not null,
    score real not null, state text not null, sum integer not null) without rowid;
create table notes (key text, fingerprint text, data text not null, sum integer not null, primary key (key, fingerprint))
    without rowid;
"""


@dataclass(frozen=True, slots=True)
class Kept:
    """A keepsake as the index knows it. `state` is JSON-able and may change; the greater `score` is kept longer."""

    key: str
    name: str
    bytes: int
    score: float
    state: dict[str, Any]


@dataclass(slots=True)
class Changes:
    """What is to become of the keep, as one transaction. states: (score, state) of keepsakes that are there or `put` here."""

    put: list[Keepsake] = field(default_factory=list)
    drop: set[str] = field(default_factory=set)
    states: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, str | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.put or self.drop or self.states or self.notes)


class Keep:
    """One folder. Precondition: the caller holds the home's lock. `problem` says why nothing is written any more."""

    def __init__(self, folder: Path, fingerprint: str, budget: int, files: Files | None = None) -> None:
        self.folder, self.fingerprint, self.budget = folder, fingerprint, budget
        self.files = files or Files()
        self.items, self.aside = folder / "items", folder / "aside"
        self.items.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.problem: str | None = None
        self.damaged = 0
        self._lock = threading.Lock()
        self._db = self._opened()
        self._kept: dict[str, Kept] = {}
        self._sweep()

    @property
    def nbytes(self) -> int:
        """Bytes of all files of keepsakes."""
        return sum(k.bytes for k in list(self._kept.values()))

    def kept(self) -> list[Kept]:
        """Every keepsake, those of the greatest score first."""
        with self._lock:
            return sorted(self._kept.values(), key=lambda k: (-k.score, k.key))

    def read(self, key: str) -> Keepsake | None:
        """One keepsake, checked; None where it is not there. A damaged one is put aside and forgotten. Any thread.

        Raises OSError.
        """
        kept = self._kept.get(key)
        if kept is None:
            return None
        try:
            found = read_keepsake(self.items / kept.name, self.fingerprint)
            if found.key != key:
                raise KeepsakeDamaged("it is another keepsake")
            return found
        except (KeepsakeDamaged, FileNotFoundError) as e:
            log.warning("a keepsake is put aside: %s: %s", kept.name[:12], e)
        with self._lock:
            self.damaged += 1
            self._put_aside(kept)
        return None

    def notes(self) -> dict[str, str]:
        """What was noted, but for notes whose sum is wrong."""
        with self._lock:
            rows = self._db.execute(
                "select key, data, sum from notes where fingerprint = ?", (self.fingerprint,)
            ).fetchall()
        return {key: data for key, data, total in rows if total == _sum(key, data)}

    def apply(self, changes: Changes) -> None:
        """Make these changes, whole or not at all: files first, then one transaction, then files that nobody needs go.

        What does not fit the budget is left out, least useful first. Does not raise for what the disk does: a full disk keeps
        nothing new, any other failure ends writing (`problem`).
        """
        with self._lock:
            if self.problem is not None:
                return
            try:
                self._apply(changes)
            except (OSError, sqlite3.Error) as e:
                if is_disk_full(e):
                    log.warning("disk full: composed state is not kept")
                else:
                    self.problem = str(e)
                    log.error("composed state is not kept from now on: %s", e)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _apply(self, changes: Changes) -> None:
        after = {key: kept for key, kept in self._kept.items() if key not in changes.drop}
        for key, (score, state) in changes.states.items():
            if key in after:
                after[key] = Kept(key, after[key].name, after[key].bytes, score, state)
        new, names = self._chosen(changes, after), list[str]()
        try:
            for keepsake in new:
                score, state = changes.states.get(keepsake.key, (0.0, {}))
                name, size = write_keepsake(self.items, keepsake, self.fingerprint, self.files)
                names.append(name)
                after[keepsake.key] = Kept(keepsake.key, name, size, score, state)
            self._record(after, changes.notes)
        except BaseException:
            for name in names:
                with contextlib.suppress(OSError):
                    self.files.unlink(self.items / name)
            raise
        gone = {k.name for k in self._kept.values()} - {k.name for k in after.values()}
        self._kept = after
        self._unlink(gone)
        if changes.drop:
            self._db.execute("pragma wal_checkpoint(truncate)")

    def _chosen(self, changes: Changes, after: dict[str, Kept]) -> list[Keepsake]:
        """What of the new fits, the most useful of all; takes out of `after` what has to leave for it."""
        for keepsake in changes.put:
            after.pop(keepsake.key, None)
        size = sum(k.bytes for k in after.values())
        weakest = sorted(after.values(), key=lambda k: k.score, reverse=True)
        chosen = []
        for keepsake in sorted(changes.put, key=lambda k: -changes.states.get(k.key, (0.0, {}))[0]):
            need, score = keepsake.nbytes + MARGIN, changes.states.get(keepsake.key, (0.0, {}))[0]
            while weakest and size + need > self.budget and weakest[-1].score <= score:
                size -= after.pop(weakest.pop().key).bytes
            if size + need <= self.budget:
                size += need
                chosen.append(keepsake)
        return chosen

    def _record(self, after: Mapping[str, Kept], notes: Mapping[str, str | None]) -> None:
        """One transaction, durable when it ends."""
        failpoint("index.begin")
        with _transaction(self._db) as run:
            for key in self._kept.keys() - after.keys():
                run("delete from items where key = ?", (key,))
            for key, kept in after.items():
                if self._kept.get(key) != kept:
                    run("insert or replace into items values (?, ?, ?, ?, ?, ?, ?)", self._row(kept))
            for key, data in notes.items():
                run("delete from notes where key = ? and fingerprint = ?", (key, self.fingerprint))
                if data is not None:
                    run(
                        "insert into notes values (?, ?, ?, ?)",
                        (key, self.fingerprint, data, _sum(key, data)),
                    )
            failpoint("index.changed")
        failpoint("index.committed")

    def _row(self, kept: Kept) -> tuple[Any, ...]:
        state = json.dumps(kept.state, separators=(",", ":"), sort_keys=True)
        columns = (kept.key, kept.name, self.fingerprint, kept.bytes, float(kept.score), state)
        return (*columns, _sum(*columns))

    def _unlink(self, names: set[str]) -> None:
        for name in names:
            failpoint("unlink.begin")
            self.files.unlink(self.items / name)
            failpoint("unlink.done")

    def _put_aside(self, kept: Kept) -> None:
        path = self.items / kept.name
        try:
            if path.is_file() and not path.is_symlink():
                self.files.move(path, self.aside)
            with _transaction(self._db) as run:
                run("delete from items where key = ?", (kept.key,))
        except (OSError, sqlite3.Error) as e:
            log.warning("%s stays in the keep: %s", kept.name[:12], e)
        self._kept.pop(kept.key, None)

    def _opened(self) -> sqlite3.Connection:
        """The index; what is no index of ours is put aside, and a new one begun."""
        path = self.folder / INDEX
        try:
            return _connect(path, self.files.durable)
        except (sqlite3.DatabaseError, KeepsakeDamaged, UnicodeError) as e:
            log.warning("the index of composed state is begun anew: %s", e)
        for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
            if os.path.lexists(file):
                self.files.move(file, self.aside)
        return _connect(path, self.files.durable)

    def _sweep(self) -> None:
        """Take in what is right and ours; the rest goes, with files that no row names."""
        for key, name, fingerprint, size, score, state, total in self._db.execute(
            "select * from items"
        ).fetchall():
            ours = (
                total == _sum(key, name, fingerprint, size, score, state) and fingerprint == self.fingerprint
            )
            if ours and os.path.basename(name) == name and (self.items / name).is_file():
                self._kept[key] = Kept(key, name, size, score, json.loads(state))
            else:
                self._db.execute("delete from items where key = ?", (key,))
        known = {k.name for k in self._kept.values()}
        with os.scandir(self.items) as entries:
            strangers = [e for e in entries if e.name not in known and e.name.endswith((TEMPORARY, SUFFIX))]
        for entry in strangers:
            if entry.is_file(follow_symlinks=False):
                self.files.unlink(Path(entry.path))


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[Any]:
    db.execute("begin immediate")
    try:
        yield db.execute
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("rollback")
        raise
    db.execute("commit")


def _connect(path: Path, durable: bool) -> sqlite3.Connection:
    """Raises KeepsakeDamaged, sqlite3.DatabaseError for what is no index of ours."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise KeepsakeDamaged("not a regular file")
    finally:
        os.close(fd)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for pragma in (
            "journal_mode=wal",
            f"synchronous={'full' if durable else 'off'}",
            "secure_delete=on",
            "fullfsync=1",
        ):
            db.execute(f"pragma {pragma}")
        tables = _tables(db)
        if not tables:
            db.executescript(f"begin; {_SCHEMA} pragma user_version={VERSION}; commit;")
        elif tables != _OWN_TABLES or db.execute("pragma user_version").fetchone()[0] != VERSION:
            raise KeepsakeDamaged("its tables are not those of a keep")
        elif db.execute("pragma quick_check").fetchone()[0] != "ok":
            raise KeepsakeDamaged("it is broken inside")
    except BaseException:
        db.close()
        raise
    return db


def _tables(db: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(db.execute("select name, coalesce(sql, '') from sqlite_master"))


def _own_tables() -> set[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_SCHEMA)
        return _tables(db)


_OWN_TABLES = _own_tables()


def _sum(*columns: Any) -> int:
    """XXH3-64 of a row's columns, as SQLite holds it: signed."""
    parts: Sequence[str] = [repr(c) for c in columns]
    return xxhash.xxh3_64_intdigest("\0".join(parts).encode()) - (1 << 63)
