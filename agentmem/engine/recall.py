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
from agentmem.engine.stream import Stream

Recalled = Callable[[dict[int, str], float], None]

STREAM_BYTES = 32 << 20
"""What is read in less time than a step of the model takes need not overlap with one."""
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
        arena, plan = self._pool.arena, self._plan(pages)
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

    def _plan(self, pages: list[Page]) -> RestorePlan:
        """Pages with slots to come into. Raises Overloaded."""
        g = self._pool.geometry
        sizes = [g.slots_for(p.raw, p.rows) for p in pages]
        taken = iter(self._pool.take(sum(sizes)))
        slots = [tuple(next(taken) for _ in range(n)) for n in sizes]
        return RestorePlan(g, list(zip(pages, slots, strict=True)))

    def streams(self, pages: list[Page]) -> bool:
        """Whether `pages` can come in layer by layer, and are enough to gain by it: now, and without packing any."""
        g = self._pool.geometry
        pieces = [(page.raw, piece) for page in pages for piece in page.pieces or ()]
        size = sum(piece.rows * g.row_bytes(piece.raw) for _, piece in pieces)
        return not self.running and size >= STREAM_BYTES and all(raw == p.raw for raw, p in pieces)

    def stream(self, pages: list[Page]) -> Stream:
        """Bring `pages` into RAM layer by layer. They count as being there at once. Raises Overloaded.

        Precondition: `streams(pages)`.
        """
        plan = self._plan(pages)
        stages = self._stages_for(plan) if isinstance(self._pool.arena, DeviceArena) else None
        stream = Stream(self._pool, self._store, pages, plan, stages)
        for page, slots in plan.pages:
            self._pool.settle(page, slots)
        return stream

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
