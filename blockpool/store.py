"""The store on disk: extents and index behind one writer thread, restores behind a few reader threads.

The engine hands over jobs and gets their outcome as a callable in `completions`, which it runs on its own thread.
"""

from __future__ import annotations

import errno
import logging
import queue
import shutil
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agentmem.blockpool.extent import ExtentData, write_extent
from agentmem.blockpool.failpoint import failpoint
from agentmem.blockpool.files import Files, is_disk_full
from agentmem.blockpool.index import ExtentRow, Index, TurnCommit
from agentmem.blockpool.page import Piece
from agentmem.blockpool.restore import Read, Reader, RestorePlan, Staged
from agentmem.blockpool.salvage import open_index
from agentmem.blockpool.scrub import Scrub
from agentmem.blockpool.shelf import Shelf
from agentmem.blockpool.vault import Locked, Vaults
from agentmem.errors import StoreError

log = logging.getLogger(__name__)

Completion = Callable[[], None]
T = TypeVar("T")


class Store:
    """One home's block store. Precondition: the caller holds the home's lock, so this is the only writer.

    A failed fsync or write makes the store read-only: serving goes on from RAM and `problem` says why.
    """

    def __init__(
        self, folder: Path, fingerprint: str, text_identity: str = "", *, durable: bool = True,
        wake: Callable[[], None] = lambda: None, files: Files | None = None, vaults: Vaults | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.files = files or Files(durable)
        self.shelf = Shelf(folder, self.files)
        self.extents = self.shelf.folder
        self.vaults = vaults
        self.index, self.salvage = open_index(folder, fingerprint, text_identity, self.files, vaults)
        self.fingerprint = fingerprint
        self.problem: str | None = None
        self.disk_full = False
        self.floor = 0
        self.quarantined = len(self.salvage.bad) + len(self.salvage.unused) if self.salvage else 0
        self.bytes_written = 0
        self.completions: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._wake = wake
        self.shelf.sweep(self.index)
        self._reader = Reader(self.extents, vaults=vaults)
        self._restores = ThreadPoolExecutor(2, thread_name_prefix="restore-job")
        self.scrub: Scrub | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_loop, name="writer", daemon=True)
        self._writer.start()

    @property
    def names(self) -> dict[int, str]:
        """File names of the extents that the index knows, by id."""
        return self.shelf.names

    @property
    def index_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.folder.glob("index.sqlite*"))

    @property
    def disk_bytes(self) -> int:
        """Bytes of everything the store keeps: extents, index, quarantine."""
        return self.shelf.extent_bytes + self.index_bytes + self.shelf.quarantine_bytes

    @property
    def degraded(self) -> str | None:
        """Why turns are not kept at present: "read-only" until a restart, "disk-full" until there is room; else None."""
        return "read-only" if self.problem is not None else "disk-full" if self.disk_full else None

    def free_disk(self) -> int:
        """Bytes that this user may still write on the store's file system."""
        return shutil.disk_usage(self.folder).free

    def size_of(self, extent: int) -> int:
        return self.shelf.size_of(extent)

    def _submit(self, work: Callable[[], T], done: Callable[[T | None, Exception | None], None]) -> None:
        """Do `work` on the writer thread; `done(result, error)` is a completion.

        The files of extents that `work` left without a page go away when `done` has run, so that no later restore can name
        them, and the restores that were submitted before are over.
        """

        def job() -> None:
            result: T | None = None
            failure: Exception | None = None
            try:
                if self.problem is not None:
                    raise OSError(errno.EROFS, f"the store is read-only: {self.problem}")
                result = work()
            except Exception as e:  # without an outcome the turn would wait for ever
                failure = e
                self._fail(e)
            held = self.shelf.hold_unused()

            def completion() -> None:
                done(result, failure)
                if self.shelf.retired.release(held):
                    self._jobs.put(self._unlink_retired)

            self._complete(completion)

        self._jobs.put(job)

    def commit(
        self,
        turn: TurnCommit,
        rows: Callable[[], ExtentData] | None,
        done: Callable[[int | None, Exception | None], None],
    ) -> None:
        """Write a turn: extent first (when it has rows), then one transaction. `done(bytes written, error)` is a completion."""

        def work() -> int:
            written = 0
            if rows is not None:
                assert turn.extent is not None
                written = self._write_extent(rows, turn.extent, lambda: self.index.commit(turn))
            else:
                self.index.commit(turn)
            self.disk_full = False
            if turn.dropped:
                self.shelf.drop_unused(self.index)
            failpoint("commit.done")
            return written

        self._submit(work, done)

    def _write_extent(
        self, rows: Callable[[], ExtentData], extent: ExtentRow, record: Callable[[], None]
    ) -> int:
        """Write an extent, then `record` it in the index; returns its bytes. On a full disk nothing is left."""
        if self.free_disk() < self.floor:
            raise OSError(errno.ENOSPC, f"less than {self.floor} bytes are free, which stay free")
        extent.name, extent.bytes = self.write_rows(rows())
        try:
            record()
        except sqlite3.Error as e:
            if is_disk_full(e):
                self.files.unlink(self.extents / extent.name)
            raise
        self.shelf.add(extent)
        self.bytes_written += extent.bytes
        return extent.bytes

    def write_rows(self, data: ExtentData) -> tuple[str, int]:
        """Write an extent, sealed where its space is; see `write_extent`. Any thread."""
        seal = self.vaults.seal(data.namespace) if self.vaults is not None else None
        return write_extent(self.extents, data, self.files, seal)

    def change(self, job: Callable[[Index], None], done: Callable[[Exception | None], None]) -> None:
        """Any other transaction of the index, on the writer thread. `done(error)` is a completion."""
        self._submit(lambda: job(self.index), lambda _, error: done(error))

    def adopt(
        self,
        extent: ExtentRow | None,
        record: Callable[[Index], None],
        done: Callable[[Exception | None], None],
    ) -> None:
        """A transaction for rows that lie in an extent which another thread has written. `done(error)` is a completion."""

        def work() -> None:
            record(self.index)
            if extent is not None:
                self.shelf.add(extent)
                self.bytes_written += extent.bytes

        self._submit(work, lambda _, error: done(error))

    def compact(
        self,
        rows: Callable[[], ExtentData],
        extent: ExtentRow,
        moved: list[tuple[int, tuple[Piece, ...]]],
        done: Callable[[int | None, Exception | None], None],
    ) -> None:
        """Write rows of several extents into a new one and move these pages there. `done(bytes written, error)` is a completion.

        Extents that nobody refers to any more go away when `done` has run and the restores that may read them are over.
        """

        def work() -> int:
            data = rows()
            move = partial(self.index.move_pieces, extent, data.namespace, moved)
            written = self._write_extent(lambda: data, extent, move)
            failpoint("compact.committed")
            self.shelf.drop_unused(self.index)
            failpoint("compact.done")
            return written

        self._submit(work, done)

    def forget(
        self,
        agent: int,
        pages: list[int],
        done: Callable[[int, Exception | None], None],
        vault: str | None = None,
        sessions: list[int] | None = None,
    ) -> None:
        """Delete an agent, or these `sessions` of it, and pages; `done(bytes freed, error)`.

        Deleted rows are overwritten in the index (secure_delete).
        The key of the space `vault` goes first: from then on nothing of it can be read, whatever else fails.
        """

        def work() -> int:
            if vault is not None and self.vaults is not None:
                self.vaults.drop(vault)
            self.index.forget(agent, pages, sessions)
            failpoint("forget.committed")
            freed = self.shelf.drop_unused(self.index)
            self.shelf.unlink_unused()
            failpoint("forget.unlinked")
            self._fold_log()
            failpoint("forget.done")
            return freed

        self._submit(work, lambda freed, error: done(freed or 0, error))

    def evict(
        self, pages: list[int], heads: dict[int, int | None], done: Callable[[int, Exception | None], None]
    ) -> None:
        """Delete pages from disk; `heads` as in `Index.drop_pages`. `done(bytes freed, error)` is a completion."""

        def work() -> int:
            self.index.drop_pages(pages, (), heads)
            failpoint("evict.committed")
            freed = self.shelf.drop_unused(self.index)
            self.shelf.unlink_unused()
            self._fold_log()
            failpoint("evict.done")
            return freed

        self._submit(work, lambda freed, error: done(freed or 0, error))

    def evict_foreign(self, need: int, done: Callable[[int, Exception | None], None]) -> None:
        """Delete state of other fingerprints, the oldest first, until `need` bytes are free; `done(bytes freed, error)`."""

        def work() -> int:
            self.index.drop_pages(self.index.foreign_pages(need), (), {})
            freed = self.shelf.drop_unused(self.index)
            self.shelf.unlink_unused()
            return freed

        self._submit(work, lambda freed, error: done(freed or 0, error))

    def _fold_log(self) -> None:
        """Fold the write-ahead log into the index; on a full disk it stays, and a later change folds it."""
        try:
            self.index.checkpoint()
        except sqlite3.Error as e:
            if not is_disk_full(e):
                raise
            log.warning("disk full: the index keeps its write-ahead log")

    def _unlink_retired(self, last: bool = False) -> None:
        """Unlink what nobody reads any more; the `last` time all that is on its way out."""
        try:
            if last:
                self.shelf.unlink_all()
            else:
                self.shelf.unlink_retired()
        except OSError as e:
            self._fail(e)

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
                failpoint("quarantine.committed")
                for extent, name in names.items():
                    if name is not None:
                        self.shelf.put_aside(extent, name)
                self.shelf.drop_unused(self.index)
                self.shelf.unlink_unused()
                failpoint("quarantine.done")
            except (OSError, sqlite3.Error) as e:
                self._fail(e)

        self._jobs.put(job)

    def restore(
        self, plan: RestorePlan, views: Sequence[np.ndarray] | None, done: Callable[[Read], None],
        stage: Staged | None = None,
    ) -> None:  # fmt: skip
        """Read a plan on the reader threads (see `Reader.read`); `done` is a completion."""
        reading = self.read(plan, views, stage)
        reading.add_done_callback(lambda read: self._complete(lambda: done(read.result())))

    def read(
        self, plan: RestorePlan, views: Sequence[np.ndarray] | None, stage: Staged | None = None,
        layers: range | None = None,
    ) -> Future[Read]:  # fmt: skip
        """The same for who waits for it. Does not fail: what goes wrong is part of the outcome."""
        ticket = self.shelf.retired.enter()

        def job() -> Read:
            try:
                result = self._reader.read(plan, self.names, views, stage, layers)
            except Exception as e:  # without an outcome the request would wait for ever
                log.exception("a restore failed")
                result = Read([], {extent: f"{type(e).__name__}: {e}" for extent, _ in plan.runs})
            if self.shelf.retired.leave(ticket):
                self._jobs.put(self._unlink_retired)
            return result

        return self._restores.submit(job)

    def path(self, extent: int) -> Path:
        return self.extents / self.names[extent]

    def _fail(self, error: Exception) -> None:
        """A full disk passes; any other error means that what was written cannot be trusted to be there."""
        # A key is missing, the drive is as it was; the caller is told.
        if isinstance(error, StoreError | Locked):
            return
        if is_disk_full(error):
            self.disk_full = True
            log.warning("disk full: this turn stays in RAM and is written with the next one")
        elif self.problem is None:
            self.problem = str(error)
            log.error("the store is read-only from now on: %s", error)

    def flush(self) -> None:
        """Wait until the writer has done what it was given before."""
        done = threading.Event()
        self._jobs.put(done.set)
        done.wait()

    def _complete(self, completion: Completion) -> None:
        self.completions.put(completion)
        self._wake()

    def _write_loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def close(self) -> None:
        """Finish the queued writes, then close. Completions that nobody drains are dropped."""
        if self.scrub is not None:
            self.scrub.stop()
        self._jobs.put(None)
        self._writer.join()
        self._restores.shutdown(wait=True)
        self._reader.close()
        self._unlink_retired(last=True)
        if self.problem is None:
            self._fold_log()
            failpoint("close.checkpointed")
        self.index.close()

    def status(self) -> dict[str, Any]:
        """Figures for health and `df`."""
        return {
            "read_only": self.problem is not None,
            "problem": self.problem,
            "disk_full": self.disk_full,
            "extents": len(self.shelf),
            "extent_bytes": self.shelf.extent_bytes,
            "index_bytes": self.index_bytes,
            "bytes": self.disk_bytes,
            "free_bytes": self.free_disk(),
            "quarantined": self.quarantined,
            "bytes_written": self.bytes_written,
            "scrub": self.scrub.status() if self.scrub is not None else None,
        }
