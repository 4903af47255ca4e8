"""A file system that remembers which of its changes a power cut could still undo, and the clones such a cut would leave.

A created file has its content when it was synced; otherwise it may be empty, cut short or zeros. Changes of a folder's entries
last when the folder was synced; before that any of them may be missing. The index is a write-ahead log: what a transaction
appended may be cut anywhere until the transaction has ended.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from agentmem.blockpool.files import Files

PAGE = 4096
Content = bytes


@dataclass(frozen=True, slots=True)
class Change:
    """A change of folder entries that is not synced: `name` goes, `target` comes with `content`; None where there is none."""

    name: str | None
    target: str | None
    content: Content = b""
    synced: bool = True


@dataclass(frozen=True, slots=True)
class Moment:
    """What is on the drive for certain, and what may be."""

    entries: dict[str, Content]
    pending: tuple[Change, ...]
    database: Sequence[bytes]
    log: Sequence[bytes]
    label: str


class Recorder(Files):
    """Files of a store that writes down every change. `moments` are the points at which the power may go.

    What lies in the folder at first is on the drive for certain.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(durable=False)
        self.folder = folder
        files = [p for name in ("extents", "quarantine") for p in (folder / name).glob("*")]
        self.entries: dict[str, Content] = {self._name(p): p.read_bytes() for p in files}
        self.pending: tuple[Change, ...] = ()
        self.moments: list[Moment] = []
        self._index = (b"", b"")

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def _content(self, name: str) -> Content:
        for change in reversed(self.pending):
            if change.target == name:
                return change.content
        return self.entries[name]

    def _record(self, label: str, change: Change | None = None) -> None:
        if change is not None:
            self.pending = (*self.pending, change)
        database, log = self.index_files()
        self.moments.append(Moment(dict(self.entries), self.pending, (database,), (log,), label))

    def index_files(self) -> tuple[bytes, bytes]:
        path, log = self.folder / "index.sqlite", self.folder / "index.sqlite-wal"
        return path.read_bytes(), log.read_bytes() if log.exists() else b""

    def create(self, path: Path, buffers: Sequence[bytes | memoryview]) -> None:
        super().create(path, buffers)
        content = path.read_bytes()
        self._record("written", Change(None, self._name(path), content, synced=False))
        self.pending = (*self.pending[:-1], replace(self.pending[-1], synced=True))
        self._record("synced")

    def rename(self, path: Path, target: Path) -> None:
        content = self._content(self._name(path))
        super().rename(path, target)
        self._record("renamed", Change(self._name(path), self._name(target), content))

    def unlink(self, path: Path) -> None:
        there = path.exists()
        super().unlink(path)
        if there:
            self._record("unlinked", Change(self._name(path), None))

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self.entries = applied(self.entries, self.pending)
        self.pending = ()
        self._record("folder synced")

    def transaction(self, point: str) -> None:
        """Called where the index begins and ends a transaction."""
        if point == "index.begin":
            self._index = self.index_files()
            self._record("before a transaction")
        elif point == "index.committed":
            database, log = self.index_files()
            before, log_before = self._index
            here = Moment(dict(self.entries), self.pending, (before,), (log_before, log), "in a transaction")
            self.moments.append(here)
            if database != before:  # the log was folded into the file as well
                checkpoint = Moment(
                    dict(self.entries), self.pending, (before, database), (log,), "in a checkpoint"
                )
                self.moments.append(checkpoint)
            self._record("after a transaction")

    def folded(self, before: tuple[bytes, bytes]) -> None:
        """Called after a checkpoint: the database is written page by page, and only then the log is cut."""
        database, log = before
        here = Moment(
            dict(self.entries), self.pending, (database, self.index_files()[0]), (log,), "in a checkpoint"
        )
        self.moments.append(here)
        self._record("after a checkpoint")


def applied(entries: dict[str, Content], changes: Sequence[Change]) -> dict[str, Content]:
    """Folder entries after `changes`."""
    result = dict(entries)
    for change in changes:
        if change.name is not None:
            result.pop(change.name, None)
        if change.target is not None:
            result[change.target] = change.content
    return result


@lru_cache(maxsize=64)
def _sum(content: bytes) -> bytes:
    """Clones of one moment share most of their files."""
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Clone:
    """Files as a power cut may leave them."""

    entries: dict[str, Content]
    database: bytes
    log: bytes
    label: str

    @property
    def digest(self) -> bytes:
        """Equal for equal clones."""
        state = hashlib.blake2b(digest_size=16)
        for name in sorted(self.entries):
            state.update(name.encode() + b"\0" + _sum(self.entries[name]))
        state.update(_sum(self.database))
        state.update(_sum(self.log))
        return state.digest()

    def write(self, folder: Path) -> None:
        (folder / "extents").mkdir(parents=True, mode=0o700)
        (folder / "quarantine").mkdir(mode=0o700)
        for name, content in self.entries.items():
            (folder / name).write_bytes(content)
        (folder / "index.sqlite").write_bytes(self.database)
        if self.log:
            (folder / "index.sqlite-wal").write_bytes(self.log)


def clones(moment: Moment, rng: random.Random, most: int) -> Iterator[Clone]:
    """At most `most` of the clones that a power cut at `moment` may leave; the plainest come first."""
    files = list(itertools.islice(_entries(moment, rng), most))
    indexes = list(itertools.islice(_indexes(moment, rng), most))
    pairs = [(files[0], i) for i in indexes] + [(f, indexes[0]) for f in files[1:]]
    rest = [(f, i) for f in files[1:] for i in indexes[1:]]
    rng.shuffle(rest)
    for entries, (database, log) in (pairs + rest)[:most]:
        yield Clone(entries, database, log, moment.label)


def _entries(moment: Moment, rng: random.Random) -> Iterator[dict[str, Content]]:
    """Every change applied, none, all but one, one alone, some; contents that were not synced in several states."""
    pending = moment.pending
    n = len(pending)
    subsets: list[tuple[int, ...]] = [tuple(range(n)), ()]
    subsets += [tuple(i for i in range(n) if i != gone) for gone in range(n)]
    subsets += [(i,) for i in range(n)]
    subsets += [tuple(i for i in range(n) if rng.random() < 0.5) for _ in range(n)]
    for subset in dict.fromkeys(subsets):
        chosen = [pending[i] for i in subset]
        loose = [i for i, c in enumerate(chosen) if not c.synced]
        for contents in itertools.product(*(_unsynced(chosen[i].content, rng) for i in loose)):
            for i, content in zip(loose, contents, strict=True):
                chosen[i] = replace(chosen[i], content=content)
            yield applied(moment.entries, chosen)


def _unsynced(content: Content, rng: random.Random) -> list[Content]:
    cut = rng.randrange(len(content) + 1)
    return [content, b"", content[:cut], b"\0" * len(content), content[:cut] + b"\0" * (len(content) - cut)]


def _indexes(moment: Moment, rng: random.Random) -> Iterator[tuple[bytes, bytes]]:
    """(database, log): the log cut between its old and its new state, or the database between its own."""
    database, log = moment.database[-1], moment.log[-1]
    yield database, log
    if len(moment.log) == 2:
        old = moment.log[0]
        same = _common(old, log)
        for _ in range(6):
            cut = rng.randint(same, len(log))
            yield database, log[:cut] + old[cut:]
            yield database, log[:cut] + b"\0" * (len(log) - cut)
            frame = 32 + (cut - 32) // (24 + PAGE) * (24 + PAGE) if cut >= 32 else 0
            yield database, log[:frame] + old[frame:]
        yield database, old
    if len(moment.database) == 2:
        old = moment.database[0]
        size = max(len(old), len(database))
        for _ in range(6):
            pages = [
                (database if rng.random() < 0.5 else old).ljust(size, b"\0")[i : i + PAGE]
                for i in range(0, size, PAGE)
            ]
            yield b"".join(pages), log
        yield old, log


def _common(a: bytes, b: bytes) -> int:
    """How many bytes of the two are the same until they differ."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)) if n else ()
    return int(different[0]) if len(different) else n
