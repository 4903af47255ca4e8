"""The shelf: the files of extents, those on their way out, and those put aside."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from agentmem.blockpool.extent import SUFFIX
from agentmem.blockpool.failpoint import failpoint
from agentmem.blockpool.files import TEMPORARY, Files
from agentmem.blockpool.index import Index
from agentmem.blockpool.retired import Retired
from agentmem.blockpool.rows import ExtentRow

log = logging.getLogger(__name__)


class Shelf:
    """Names and sizes of the extents that the index knows, by id. Files come and go on the writer thread."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder / "extents"
        self.quarantine = folder / "quarantine"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.files = files
        self.names: dict[int, str] = {}
        self.retired = Retired()
        self._sizes: dict[int, int] = {}
        self._unused: list[ExtentRow] = []
        self.quarantine_bytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def extent_bytes(self) -> int:
        return sum(list(self._sizes.values()))

    def size_of(self, extent: int) -> int:
        return self._sizes.get(extent, 0)

    def sweep(self, index: Index) -> None:
        """Remove what no committed turn refers to. What is no regular file is not ours and is left alone."""
        try:
            if unused := index.unused_extents():
                index.delete_extents(unused)
        except sqlite3.Error as e:
            log.warning("extents that nobody uses stay in the index: %s", e)
        for row in index.extents():
            self.add(row)
        known = set(self.names.values())
        with os.scandir(self.folder) as entries:
            strangers = [e for e in entries if e.name not in known and e.name.endswith((TEMPORARY, SUFFIX))]
        for entry in strangers:
            try:
                if not entry.is_file(follow_symlinks=False):
                    raise OSError(errno.EINVAL, "not a regular file")
                self.files.unlink(Path(entry.path))
            except OSError as e:
                log.warning("%s is left where it is: %s", entry.path, e)
        if self.quarantine.is_dir():
            self.quarantine_bytes = sum(p.lstat().st_size for p in self.quarantine.iterdir())

    def add(self, extent: ExtentRow) -> None:
        """The index knows this extent now."""
        self.names[extent.id] = extent.name
        self._sizes[extent.id] = extent.bytes

    def drop_unused(self, index: Index) -> int:
        """Delete extents that no page refers to from the index; their files go next. Returns their bytes."""
        unused = index.unused_extents()
        if unused:
            failpoint("drop.begin")
            index.delete_extents(unused)
            self._unused += unused
            failpoint("drop.done")
        return sum(e.bytes for e in unused)

    def hold_unused(self) -> int:
        """Keep the files of what was dropped for restores to come; returns what `Retired.release` takes."""
        held = self.retired.hold(self._unused)
        self._unused = []
        return held

    def unlink_unused(self) -> None:
        """Unlink them now, unless restores run. Precondition: the engine has no page any more that lies in them."""
        self.retired.release(self.hold_unused())
        self.unlink_retired()

    def unlink_retired(self) -> None:
        """Unlink what no restore reads any more."""
        self._remove(self.retired.free())

    def unlink_all(self) -> None:
        """Unlink everything that is on its way out. Precondition: no restore runs or will run."""
        self._remove(self.retired.drain())

    def _remove(self, extents: Iterable[ExtentRow]) -> None:
        for e in extents:
            failpoint("unlink.begin")
            self.files.unlink(self.folder / e.name)
            failpoint("unlink.done")
            self.names.pop(e.id, None)
            self._sizes.pop(e.id, None)

    def put_aside(self, extent: int, name: str) -> None:
        """Move a damaged extent's file, if it is there, to the quarantine folder."""
        path = self.folder / name
        if path.exists() or path.is_symlink():
            self.quarantine_bytes += self.size_of(extent)
            self.files.move(path, self.quarantine)
            failpoint("quarantine.moved")
        self._sizes.pop(extent, None)
