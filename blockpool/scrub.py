"""The scrub: extents are read again in idle time, so that damage is found before somebody needs the rows."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from agentmem.blockpool.extent import Extent, ExtentCorrupt
from agentmem.blockpool.shelf import Shelf
from agentmem.blockpool.verify import stripes

log = logging.getLogger(__name__)

FIRST_S = 60.0  # after the start
REST_S = 3600.0  # between two passes
WAIT_S = 0.2


class Scrub:
    """Reads every extent of a shelf, again and again, `rate` bytes per second, while `idle` says so. A thread of its own.

    `found` hears of damage: {extent id: what is wrong}. The first pass begins `first` seconds after the start.
    """

    def __init__(
        self,
        shelf: Shelf,
        rate: float,
        idle: Callable[[], bool],
        found: Callable[[dict[int, str]], None],
        first: float = FIRST_S,
    ) -> None:
        self._shelf, self._rate, self._idle, self._found, self._first = shelf, rate, idle, found, first
        self._over = threading.Event()
        self.bytes = 0
        self.extents = 0
        self.passes = 0
        self.bad = 0
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)

    def start(self) -> None:
        if self._rate > 0:
            self._thread.start()

    def stop(self) -> None:
        """Stop; returns when no file is read any more."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def status(self) -> dict[str, Any]:
        """Since the start: bytes and extents read, whole passes, damaged extents found."""
        return {
            "bytes_per_s": self._rate,
            "bytes": self.bytes,
            "extents": self.extents,
            "passes": self.passes,
            "bad": self.bad,
        }

    def _run(self) -> None:
        self._over.wait(self._first)
        while not self._over.is_set():
            for extent in sorted(self._shelf.names):
                self._check(extent)
                if self._over.is_set():
                    return
            self.passes += 1
            self._over.wait(REST_S)

    def _check(self, extent: int) -> None:
        """Read one extent, as long as the index knows it."""
        name = self._shelf.names.get(extent)
        if name is None:
            return
        try:
            file = Extent(self._shelf.folder / name)
            try:
                for size in stripes(file):
                    self.bytes += size
                    if not self._pause(size) or extent not in self._shelf.names:
                        return
            finally:
                file.close()
            self.extents += 1
        except (ExtentCorrupt, OSError, ValueError) as e:
            self._over.wait(WAIT_S)  # a file that is being removed leaves the shelf a moment later
            if extent in self._shelf.names and not self._over.is_set():
                self.bad += 1
                self._found({extent: f"found by the scrub: {type(e).__name__}: {e}"})

    def _pause(self, size: int) -> bool:
        """Wait as long as the rate asks for, and while the engine is busy; False when the scrub is to stop."""
        end = time.monotonic() + size / self._rate
        while (left := end - time.monotonic()) > 0 or not self._idle():
            if self._over.wait(min(max(left, 0.0), WAIT_S) or WAIT_S):
                return False
        return not self._over.is_set()
