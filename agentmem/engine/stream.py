"""Layer-streamed restore: the pass over a prompt begins while the rows of later layers are still read."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future

from agentmem.blockpool.arena import DeviceArena, HostArena
from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.restore import Read, RestorePlan, Staged
from agentmem.blockpool.stage import Stage
from agentmem.blockpool.store import Store
from agentmem.engine.placement import layer_groups, place, stage_need

GROUPS = 8
"""Into which the layers are divided, at most: what is read at once must be worth a start of its own."""
AHEAD = 2
"""Groups that are read at the same time, or wait to be placed."""


class StreamBroken(Exception):
    """Rows that a pass waited for are damaged; `Stream.bad` says which."""


class Stream:
    """Pages that come into RAM layer by layer, in slots that are theirs already. Engine thread only.

    `wait` must have returned for every layer before anything but the pass that waits for them may read the pages.
    """

    def __init__(
        self, pool: Pool, store: Store, pages: list[Page], plan: RestorePlan, stages: tuple[Stage, Stage] | None
    ) -> None:  # fmt: skip
        self.pages, self.bad = pages, dict[int, str]()
        self.seconds = 0.0
        self._pool, self._store, self._plan, self._stages = pool, store, plan, stages
        words = sum(stage_need(plan, range(i, i + 1)) for i in range(plan.geometry.layers))
        room = -(-words // GROUPS)
        self._groups = layer_groups(plan, min(room, stages[0].words) if stages is not None else room)
        self._reading: deque[Future[Read]] = deque()
        self._started, self._placed, self._arrived = 0, 0, 0
        self._begun = time.perf_counter()
        self._read_on()

    def has(self, layer: int) -> bool:
        """Whether the rows of a layer are there."""
        return layer < self._arrived

    def wait(self, layer: int) -> None:
        """Return when the rows of the layer, and of those before it, are there. Raises StreamBroken."""
        while not self.has(layer):
            if not self._reading:
                raise StreamBroken
            self._take(self._reading.popleft().result())

    def finish(self) -> None:
        """Wait for whatever is still read; `bad` says whether it is good."""
        while self._reading:
            self._take(self._reading.popleft().result())

    def _read_on(self) -> None:
        while self._started < len(self._groups) and self._started - self._placed < AHEAD and not self.bad:
            group = self._groups[self._started]
            views, staged = None, None
            if self._stages is not None:
                staged = Staged(self._stages[self._started % 2].memory, group)
            else:
                arena = self._pool.arena
                assert isinstance(arena, HostArena)
                views = [arena.view(layer) for layer in range(self._plan.geometry.layers)]
            self._reading.append(self._store.read(self._plan, views, staged, group))
            self._started += 1

    def _take(self, outcome: Read) -> None:
        """A group was read: put it into its place, and read on."""
        self.bad |= outcome.bad
        group = self._groups[self._placed]
        if not self.bad:
            if self._stages is not None:
                arena, stage = self._pool.arena, self._stages[self._placed % 2]
                assert isinstance(arena, DeviceArena)
                place(self._plan, arena, stage.load(stage_need(self._plan, group)), group, in_use=False)
            self._arrived = group.stop
        self._placed += 1
        self._read_on()
        if not self._reading:
            self.seconds = time.perf_counter() - self._begun
