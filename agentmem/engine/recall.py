"""Recall: pages from disk back into RAM, without blocking the engine while files are read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from agentmem.blockpool.arena import DeviceArena, HostArena
from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.restore import Read, RestorePlan, Stage
from agentmem.blockpool.store import Store
from agentmem.engine.placement import layer_groups, place, stage_need

Recalled = Callable[[dict[int, str], float], None]

STAGE_WORDS = 64 << 20


class Recall:
    """Restores pages. Engine thread only.

    Where the arena is host memory, reader threads fill it. For a discrete GPU they fill a stage, memory that host and device
    both address, a group of layers at a time; MLX scatters each group into the arena. One pass reads and checks the bytes,
    faster than MLX's own file loader.
    """

    def __init__(self, pool: Pool, store: Store) -> None:
        self._pool = pool
        self._store = store
        self._stage: mx.array | None = None
        self._waiting: deque[Callable[[], None]] = deque()
        self.running = 0

    def start(self, pages: list[Page], done: Recalled) -> None:
        """Bring `pages` (on disk, not in RAM, pinned by the caller) into RAM; `done(bad extents, seconds)` on the engine thread.

        With bad extents nothing was restored. Raises Overloaded when there are no slots.
        """
        g, arena = self._pool.geometry, self._pool.arena
        sizes = [g.slots_for(p.raw, p.rows) for p in pages]
        taken = iter(self._pool.take(sum(sizes)))
        slots = [tuple(next(taken) for _ in range(n)) for n in sizes]
        plan = RestorePlan(g, list(zip(pages, slots, strict=True)))
        start = time.perf_counter()

        def finish(bad: dict[int, str]) -> None:
            self.running -= 1
            if self._waiting:
                self._waiting.popleft()()
            for page, s in plan.pages:
                if bad or page.slots is not None:
                    self._pool.release(s)
                else:
                    self._pool.settle(page, s)
            done(bad, time.perf_counter() - start)

        self.running += 1
        if isinstance(arena, HostArena):
            self._direct(plan, arena, finish)
            return
        assert isinstance(arena, DeviceArena)
        groups = layer_groups(plan, STAGE_WORDS)
        if self.running > 1:  # there is one stage
            self._waiting.append(lambda: self._staged(plan, arena, groups, finish))
        else:
            self._staged(plan, arena, groups, finish)

    def _direct(self, plan: RestorePlan, arena: HostArena, finish: Callable[[dict[int, str]], None]) -> None:
        """Reader threads fill the arena."""

        def read(outcome: Read) -> None:
            if not outcome.bad:
                self._repack(plan, [mx.array(a) for a in outcome.scratch])
            finish(outcome.bad)

        self._store.restore(plan, [arena.view(layer) for layer in range(plan.geometry.layers)], read)

    def _repack(self, plan: RestorePlan, scratch: list[mx.array]) -> None:
        """Pack rows that lay raw on disk in pages that are packed in RAM. Row-wise, so the bits are those of the first time."""
        for slots, page_row, at, rows in plan.repack:
            packed = [c.pack(a[at : at + rows]) for c, a in zip(plan.geometry.codecs, scratch, strict=True)]
            mx.eval(packed)
            self._pool.arena.write_packed(slots, packed, page_row)

    def _staged(
        self,
        plan: RestorePlan,
        arena: DeviceArena,
        groups: list[range],
        finish: Callable[[dict[int, str]], None],
    ) -> None:
        """Reader threads fill the stage with the first group of layers, MLX places it, then the next group.

        One after the other: with a second, smaller stage filled meanwhile an H200 took longer
        (430 against 263 ms for 1.2 GB).
        """
        layers, *rest = groups
        stage = self._stage_of(stage_need(plan, layers))

        def read(outcome: Read) -> None:
            if outcome.bad:
                finish(outcome.bad)
                return
            place(plan, arena, stage, layers)
            if rest:
                self._staged(plan, arena, rest, finish)
            else:
                finish({})

        self._store.restore(plan, None, read, Stage(np.array(stage, copy=False), layers))

    def _stage_of(self, words: int) -> mx.array:
        """The stage, made on the CPU stream so that the host may write to it; kept, because new memory is slow at first."""
        if self._stage is None or self._stage.size < words:
            size = max(words, min(STAGE_WORDS, self._pool.capacity_bytes // 4))
            self._stage = mx.zeros((size,), mx.uint32, stream=mx.cpu)
            mx.eval(self._stage)
        return self._stage
