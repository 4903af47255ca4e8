"""Slots: fixed-size places in the arena, counted by reference."""

from __future__ import annotations

import numpy as np

from agentmem.errors import Overloaded


class Slots:
    """Allocator of `count` slots. A slot is free exactly when its reference count is 0.

    Runs are handed out contiguously where possible, because contiguous slots restore with one read.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._refs = np.zeros(count, dtype=np.int32)
        self._free = count
        self.peak = 0
        """Most slots that were in use at once since this was last set."""

    @property
    def free(self) -> int:
        return self._free

    def take(self, n: int) -> list[int]:
        """`n` slots with one reference each; raises Overloaded, changing nothing, when fewer are free."""
        if n > self._free:
            raise Overloaded(f"{n} KV slots needed, {self._free} of {self.count} free")
        if n == 0:
            return []
        free = np.flatnonzero(self._refs == 0)
        start = self._run(free, n)
        chosen = free[start : start + n]
        self._refs[chosen] = 1
        self._free -= n
        self.peak = max(self.peak, self.count - self._free)
        return [int(s) for s in chosen]

    @staticmethod
    def _run(free: np.ndarray, n: int) -> int:
        """Index into `free` where the first contiguous run of `n` starts, else 0."""
        if free.size > n:
            spans = np.flatnonzero(free[n - 1 :] - free[: free.size - n + 1] == n - 1)
            return int(spans[0]) if spans.size else 0
        return 0

    def share(self, slots: tuple[int, ...]) -> None:
        """One more reference to slots that are in use."""
        for s in slots:
            assert self._refs[s] > 0, f"slot {s} is free"
            self._refs[s] += 1

    def release(self, slots: tuple[int, ...]) -> None:
        """One reference less; a slot at 0 is free again."""
        for s in slots:
            assert self._refs[s] > 0, f"slot {s} is free already"
            self._refs[s] -= 1
            self._free += int(self._refs[s] == 0)

    def check(self) -> None:
        """Integrity: the free count equals the slots without references."""
        assert self._free == int((self._refs == 0).sum())
        assert (self._refs >= 0).all()
