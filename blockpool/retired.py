"""Retired extents: out of the index, but not yet unlinked, because a restore that has begun may still read them."""

from __future__ import annotations

import threading

from agentmem.blockpool.rows import ExtentRow


class Retired:
    """Which files may be unlinked when. Any thread.

    held --release--> waits for the restores that run at that moment --they end--> free

    Extents are held as long as a later restore may still name them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._running: set[int] = set()
        self._held: dict[int, list[ExtentRow]] = {}
        self._waiting: list[tuple[int, ExtentRow]] = []

    def hold(self, extents: list[ExtentRow]) -> int:
        """These extents left the index; returns what `release` takes."""
        with self._lock:
            self._last += 1
            self._held[self._last] = extents
            return self._last

    def release(self, held: int) -> bool:
        """From now on no new restore reads these extents. Returns whether extents wait to be unlinked."""
        with self._lock:
            self._waiting.extend((self._last, e) for e in self._held.pop(held))
            return bool(self._waiting)

    def enter(self) -> int:
        """A restore begins; returns its ticket."""
        with self._lock:
            self._last += 1
            self._running.add(self._last)
            return self._last

    def leave(self, ticket: int) -> bool:
        """A restore is over; returns whether extents wait to be unlinked."""
        with self._lock:
            self._running.discard(ticket)
            return bool(self._waiting)

    def free(self) -> list[ExtentRow]:
        """Take the extents whose files nobody reads any more."""
        with self._lock:
            oldest = min(self._running, default=self._last + 1)
            free = [e for last, e in self._waiting if last < oldest]
            self._waiting = [(last, e) for last, e in self._waiting if last >= oldest]
            return free

    def drain(self) -> list[ExtentRow]:
        """Take all. Precondition: no restore runs or will run."""
        with self._lock:
            everything = [e for _, e in self._waiting] + [e for held in self._held.values() for e in held]
            self._waiting.clear()
            self._held.clear()
            return everything
