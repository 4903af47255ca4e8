"""The store on disk: extents and index behind one writer thread, restores behind a few reader threads.

The engine hands over jobs and gets their outcome as a callable in `completions`, which it runs on its own thread.
"""

from __future__ import annotations

import errno
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.blockpool.extent import SUFFIX, ExtentData, write_extent
from agentmem.blockpool.files import TEMPORARY, Files
from agentmem.blockpool.index import ExtentRow, Index, TurnCommit
from agentmem.blockpool.restore import Read, Reader, RestorePlan, Staged

log = logging.getLogger(__name__)

Completion = Callable[[], None]


class Store:
    """One home's block store. Precondition: the caller holds the home's lock, so this is the only writer.

    A failed fsync or write makes the store read-only: serving goes on from RAM and `problem` says why.
    """

    def __init__(
        self, folder: Path, fingerprint: str, *, durable: bool = True, wake: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = folder
        self.extents = folder / "extents"
        self.quarantine_folder = folder / "quarantine"
        self.extents.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.files = Files(durable)
        fresh = not (folder / "index.sqlite").exists()
        self.index = Index(folder / "index.sqlite", fingerprint, durable=durable)
        self.fingerprint = fingerprint
        self.problem: str | None = None
        self.quarantined = 0
        self.bytes_written = 0
        self.completions: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self.names: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._wake = wake
        self._sweep(fresh)
        self._reader = Reader(self.extents)
        self._restores = ThreadPoolExecutor(2, thread_name_prefix="restore-job")
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_loop, name="writer", daemon=True)
        self._writer.start()

    @property
    def extent_bytes(self) -> int:
        return sum(self._sizes.values())

    @property
    def index_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.folder.glob("index.sqlite*"))

    def size_of(self, extent: int) -> int:
        return self._sizes.get(extent, 0)

    def _sweep(self, fresh: bool) -> None:
        """Remove what no committed turn refers to. Extents beside a new index are kept apart, not deleted."""
        for row in self.index.extents():
            self.names[row.id] = row.name
            self._sizes[row.id] = row.bytes
        known = set(self.names.values())
        for path in list(self.extents.iterdir()):
            if path.name in known or path.suffix not in (TEMPORARY, SUFFIX):
                continue
            try:
                if fresh and path.suffix == SUFFIX:
                    self.files.move(path, self.quarantine_folder)
                else:
                    path.unlink()
            except OSError as e:
                log.warning("%s is left where it is: %s", path, e)

    def commit(
        self,
        turn: TurnCommit,
        rows: Callable[[], ExtentData] | None,
        done: Callable[[int | None, Exception | None], None],
    ) -> None:
        """Write a turn: extent first (when it has rows), then one transaction. `done(bytes written, error)` is a completion."""

        def job() -> None:
            written: int | None = None
            try:
                written = self._commit(turn, rows)
            except (OSError, sqlite3.Error) as e:
                self._fail(e)
                self._complete(lambda e=e: done(None, e))  # type: ignore[misc]
                return
            self._complete(lambda: done(written, None))

        self._jobs.put(job)

    def _commit(self, turn: TurnCommit, rows: Callable[[], ExtentData] | None) -> int:
        if self.problem is not None:
            raise OSError(errno.EROFS, f"the store is read-only: {self.problem}")
        written = 0
        if rows is not None:
            assert turn.extent is not None
            turn.extent.name, written = write_extent(self.extents, rows(), self.files)
            turn.extent.bytes = written
        try:
            self.index.commit(turn)
        except sqlite3.Error as e:
            if turn.extent is not None and _disk_full(e):
                self.files.unlink(self.extents / turn.extent.name)
            raise
        if turn.extent is not None:
            self.names[turn.extent.id] = turn.extent.name
            self._sizes[turn.extent.id] = turn.extent.bytes
        if turn.dropped:
            self._unlink_unused()
        self.bytes_written += written
        return written

    def _unlink_unused(self) -> int:
        """Delete extents that no page refers to: transaction first, then the file. Returns bytes freed."""
        unused = self.index.unused_extents()
        if unused:
            self.index.delete_extents(unused)
            self._remove_files(unused)
        return sum(e.bytes for e in unused)

    def _remove_files(self, extents: Iterable[ExtentRow]) -> None:
        for e in extents:
            self.files.unlink(self.extents / e.name)
            self.names.pop(e.id, None)
            self._sizes.pop(e.id, None)

    def forget(self, agent: int, pages: list[int], done: Callable[[int, Exception | None], None]) -> None:
        """Delete an agent and pages; `done(bytes freed, error)`. Deleted rows are overwritten in the index (secure_delete)."""

        def job() -> None:
            freed = 0
            try:
                self.index.forget(agent, pages)
                freed = self._unlink_unused()
                self.index.checkpoint()
            except (OSError, sqlite3.Error) as e:
                self._fail(e)
                self._complete(lambda e=e: done(0, e))  # type: ignore[misc]
                return
            self._complete(lambda: done(freed, None))

        self._jobs.put(job)

    def quarantine(
        self, bad: dict[int, str], pages: list[int], bare: list[int], heads: dict[int, int | None]
    ) -> None:
        """Put damaged extents aside and forget the pages in them; see `Index.drop_pages`."""
        names = {e: self.names.get(e) for e in bad}
        for extent, reason in bad.items():
            log.warning(
                "extent %s quarantined: %s; its tokens will be prefilled", (names[extent] or "?")[:12], reason
            )
        self.quarantined += len(bad)

        def job() -> None:
            try:
                self.index.drop_pages(pages, bare, heads)
                for extent, name in names.items():
                    path = self.extents / (name or "?")
                    if path.exists():
                        self.files.move(path, self.quarantine_folder)
                    self._sizes.pop(extent, None)
                self._unlink_unused()
            except (OSError, sqlite3.Error) as e:
                self._fail(e)

        self._jobs.put(job)

    def restore(
        self,
        plan: RestorePlan,
        views: Sequence[np.ndarray] | None,
        done: Callable[[Read], None],
        stage: Staged | None = None,
    ) -> None:
        """Read a plan on the reader threads (see `Reader.read`); `done` is a completion."""

        def job() -> None:
            try:
                result = self._reader.read(plan, self.names, views, stage)
            except Exception as e:  # without an outcome the request would wait for ever
                log.exception("a restore failed")
                result = Read([], {extent: f"{type(e).__name__}: {e}" for extent, _ in plan.runs})
            self._complete(lambda: done(result))

        self._restores.submit(job)

    def path(self, extent: int) -> Path:
        return self.extents / self.names[extent]

    def _fail(self, error: Exception) -> None:
        """A full disk passes; any other error means that what was written cannot be trusted to be there."""
        if _disk_full(error):
            log.warning("disk full: this turn stays in RAM and is written with the next one")
        elif self.problem is None:
            self.problem = str(error)
            log.error("the store is read-only from now on: %s", error)

    def _complete(self, completion: Completion) -> None:
        self.completions.put(completion)
        self._wake()

    def _write_loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def close(self) -> None:
        """Finish the queued writes, then close. Completions that nobody drains are dropped."""
        self._jobs.put(None)
        self._writer.join()
        self._restores.shutdown(wait=True)
        self._reader.close()
        if self.problem is None:
            self.index.checkpoint()
        self.index.close()

    def status(self) -> dict[str, Any]:
        """Figures for health and `df`."""
        return {
            "read_only": self.problem is not None,
            "problem": self.problem,
            "extents": len(self._sizes),
            "extent_bytes": self.extent_bytes,
            "index_bytes": self.index_bytes,
            "quarantined": self.quarantined,
            "bytes_written": self.bytes_written,
        }


def _disk_full(error: Exception) -> bool:
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
