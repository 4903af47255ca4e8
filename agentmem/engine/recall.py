"""Recall: pages from disk back into RAM, without blocking the engine while files are read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import groupby

import mlx.core as mx
import numpy as np

from agentmem.blockpool.arena import DeviceArena, HostArena
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.restore import Read, RestorePlan, Staged
from agentmem.blockpool.stage import Stage, make_stage
from agentmem.blockpool.store import Store
from agentmem.engine.placement import layer_groups, place, stage_need

Recalled = Callable[[dict[int, str], float], None]

STAGE_WORDS = 32 << 20
"""Words of each of the two stages: 128 MiB."""


class Recall:
    """Restores pages. Engine thread only.

    Where the arena is host memory, reader threads fill it. For a discrete GPU they fill a stage a group of layers at a time,
    and MLX scatters each group into the arena. One pass reads and checks the bytes, faster than MLX's own file loader.
    """

    def __init__(self, pool: Pool, store: Store) -> None:
        self._pool = pool
        self._store = store
        self._stages: tuple[Stage, Stage] | None = None
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
        if self.running > 1:  # the stages serve one restore at a time
            self._waiting.append(lambda: self._staged(plan, arena, finish))
        else:
            self._staged(plan, arena, finish)

    def _direct(self, plan: RestorePlan, arena: HostArena, finish: Callable[[dict[int, str]], None]) -> None:
        """Reader threads fill the arena."""

        def read(outcome: Read) -> None:
            if not outcome.bad:
                self._repack(plan, [mx.array(a) for a in outcome.scratch])
            finish(outcome.bad)

        self._store.restore(plan, [arena.view(layer) for layer in range(plan.geometry.layers)], read)

    def _repack(self, plan: RestorePlan, scratch: list[mx.array]) -> None:
        """Pack rows that lay raw on disk in pages that are packed in RAM. Row-wise, so the bits are those of the first time."""
        if not plan.repack:
            return
        packed = _packed(plan.geometry, scratch)
        for slots, page_row, at, rows in plan.repack:
            self._pool.arena.write_packed(slots, [p[at : at + rows] for p in packed], page_row)

    def _staged(
        self,
        plan: RestorePlan,
        arena: DeviceArena,
        finish: Callable[[dict[int, str]], None],
    ) -> None:
        """Reader threads fill one stage with a group of layers while MLX places the group before it out of the other."""
        stages = self._stages_for(plan)
        groups = layer_groups(plan, stages[0].words)

        def read(group: int) -> None:
            staged = Staged(stages[group % 2].memory, groups[group])
            self._store.restore(plan, None, lambda outcome: arrived(group, outcome), staged)

        def arrived(group: int, outcome: Read) -> None:
            if outcome.bad:
                finish(outcome.bad)
                return
            last = group + 1 == len(groups)
            if not last:
                read(group + 1)
            stage = stages[group % 2]
            place(plan, arena, stage.load(stage_need(plan, groups[group])), groups[group])
            if last:
                finish({})

        read(0)

    def _stages_for(self, plan: RestorePlan) -> tuple[Stage, Stage]:
        """Two stages that hold at least one layer of the plan each; kept, because new memory is slow at first."""
        least = max(stage_need(plan, range(i, i + 1)) for i in range(plan.geometry.layers))
        if self._stages is None or self._stages[0].words < least:
            words = max(least, min(STAGE_WORDS, self._pool.capacity_bytes // 16))
            self._stages = make_stage(words), make_stage(words)
        return self._stages


def _packed(geometry: Geometry, scratch: list[mx.array]) -> list[np.ndarray]:
    """Raw rows of every layer, packed; layers of one codec together, because few rows a layer are mostly overhead."""
    packed: list[np.ndarray] = []
    for codec, layers in groupby(range(geometry.layers), key=lambda layer: geometry.codecs[layer]):
        group = [scratch[layer] for layer in layers]
        rows = codec.pack(mx.concatenate(group))
        mx.eval(rows)
        packed.extend(np.split(np.array(rows, copy=False), len(group)))
    return packed
