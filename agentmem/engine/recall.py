"""Recall: pages from disk back into RAM, without blocking the engine where host threads can fill the arena."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from agentmem.blockpool.arena import DeviceArena, HostArena
from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.restore import Read, RestorePlan
from agentmem.blockpool.store import Store
from agentmem.engine.placement import Loaded, from_host, load_files, place

Recalled = Callable[[dict[int, str], float], None]

SMALL = 8 << 20


class Recall:
    """Restores pages. Engine thread only.

    Where the arena is host memory, reader threads fill it. On a discrete GPU MLX loads large extents into device memory
    while the reader threads check the same bytes; small ones are copied from what the threads read, all layers at once,
    because dozens of small loads cost more than their bytes.
    """

    def __init__(self, pool: Pool, store: Store) -> None:
        self._pool = pool
        self._store = store
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
        loaded: Loaded = {}
        start = time.perf_counter()

        def finish(read: Read) -> None:
            self.running -= 1
            if not read.bad:
                if isinstance(arena, DeviceArena):
                    place(plan, arena, loaded | from_host(plan, read.kept))
                else:
                    self._repack(plan, [mx.array(a) for a in read.scratch])
            for page, s in plan.pages:
                if read.bad or page.slots is not None:
                    self._pool.release(s)
                else:
                    self._pool.settle(page, s)
            done(read.bad, time.perf_counter() - start)

        self.running += 1
        if isinstance(arena, HostArena):
            self._store.restore(plan, [arena.view(layer) for layer in range(g.layers)], finish)
            return
        extents = {e for e, _ in plan.runs}
        small = {e for e in extents if self._store.size_of(e) < SMALL}
        self._store.restore(plan, None, finish, keep=small)
        loaded.update(load_files(plan, {e: self._store.path(e) for e in extents - small}))

    def _repack(self, plan: RestorePlan, scratch: list[mx.array]) -> None:
        """Pack rows that lay raw on disk in pages that are packed in RAM. Row-wise, so the bits are those of the first time."""
        for slots, page_row, at, rows in plan.repack:
            packed = [
                c.pack(a[at : at + rows]) for c, a in zip(self._pool.geometry.codecs, scratch, strict=True)
            ]
            mx.eval(packed)
            self._pool.arena.write_packed(slots, packed, page_row)
