"""The file-system seam: every byte the store makes durable passes through here."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from agentmem.blockpool.failpoint import failpoint

TEMPORARY = ".tmp"
IOV = 512


def sync(fd: int) -> None:
    """Flush a file to the drive. macOS's fsync leaves bytes in the drive's cache, F_FULLFSYNC does not."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


class Files:
    """Durable file operations. With `durable=False` (commit policy `none`) nothing is synced."""

    def __init__(self, durable: bool = True) -> None:
        self.durable = durable

    def write_durably(self, path: Path, buffers: Sequence[bytes | memoryview]) -> None:
        """Create `path` with `buffers` as content, whole or not at all. Raises OSError."""
        failpoint("file.begin")
        temporary = path.with_name(f"{uuid.uuid4().hex}{TEMPORARY}")
        try:
            self.create(temporary, buffers)
            self.rename(temporary, path)
            failpoint("file.renamed")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self.sync_folder(path.parent)
        failpoint("file.durable")

    def create(self, path: Path, buffers: Sequence[bytes | memoryview]) -> None:
        """A new file whose content is on the drive."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, buffers)
            failpoint("file.written")
            if self.durable:
                sync(fd)
            failpoint("file.synced")
        finally:
            os.close(fd)

    def rename(self, path: Path, target: Path) -> None:
        os.rename(path, target)

    def sync_folder(self, folder: Path) -> None:
        """Make renames and unlinks in `folder` durable."""
        if not self.durable:
            return
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def move(self, path: Path, folder: Path) -> None:
        """Move a file into another folder of the same home. What has its name there already stays."""
        folder.mkdir(mode=0o700, exist_ok=True)
        target, n = folder / path.name, 0
        while target.exists() or target.is_symlink():
            n += 1
            target = folder / f"{path.name}.{n}"
        self.rename(path, target)
        self.sync_folder(folder)
        self.sync_folder(path.parent)

    def publish(self, path: Path, target: Path) -> None:
        """Give a finished file of the same folder its name, durably; replaces what has the name."""
        if self.durable:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                sync(fd)
            finally:
                os.close(fd)
        os.replace(path, target)
        self.sync_folder(target.parent)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


def _write_all(fd: int, buffers: Sequence[bytes | memoryview]) -> None:
    pending = [memoryview(b) for b in buffers]
    while pending:
        written = os.writev(fd, pending[:IOV])
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]


def is_disk_full(error: Exception) -> bool:
    """Whether an error of the file system or of SQLite tells of a disk without room."""
    if isinstance(error, sqlite3.Error):
        full = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
        return getattr(error, "sqlite_errorcode", None) in full
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def why_not(error: Exception) -> str:
    """What an error of the file system or of SQLite says to whoever wanted to start."""
    return "the disk is full; make room and start again" if is_disk_full(error) else str(error)
