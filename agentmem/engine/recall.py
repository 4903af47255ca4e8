"""Recall: pages from disk back into RAM, without blocking the engine where host threads can fill the arena."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from agentmem.blockpool.arena import DeviceArena, HostArena
from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.restore import RestorePlan, Run
from agentmem.blockpool.store import Store

Recalled = Callable[[dict[int, str], float], None]


class Recall:
    """Restores pages. Engine thread only."""

    def __init__(self, pool: Pool, store: Store) -> None:
        self._pool = pool
        self._store = store
        self.running = 0
        self.bytes_read = 0

    def start(self, pages: list[Page], done: Recalled) -> None:
        """Bring `pages` (on disk, not in RAM, pinned by the caller) into RAM; `done(bad extents, seconds)` on the engine thread.

        With bad extents nothing was restored. Raises Overloaded when there are no slots.
        """
        g = self._pool.geometry
        sizes = [g.slots_for(p.raw, p.rows) for p in pages]
        taken = iter(self._pool.take(sum(sizes)))
        slots = [tuple(next(taken) for _ in range(n)) for n in sizes]
        plan = RestorePlan(g, list(zip(pages, slots, strict=True)))
        self.running += 1
        arena = self._pool.arena
        views = [arena.view(layer) for layer in range(g.layers)] if isinstance(arena, HostArena) else None
        start = time.perf_counter()

        def finish(scratch: list[np.ndarray], bad: dict[int, str], _: float) -> None:
            self.running -= 1
            taken_late = [(p, s) for p, s in plan.pages if p.slots is not None]
            for page, s in plan.pages:
                if bad or (page, s) in taken_late:
                    self._pool.release(s)
                else:
                    self._pool.settle(page, s)
            if not bad:
                self.bytes_read += plan.bytes
                if views is not None:
                    self._repack(plan, [mx.array(a) for a in scratch])
            done(bad, time.perf_counter() - start)

        self._store.restore(plan, views, finish)
        if isinstance(arena, DeviceArena):
            self._load_on_device(plan, arena)

    def _repack(self, plan: RestorePlan, scratch: list[mx.array]) -> None:
        """Pack rows that lay raw on disk in pages that are packed in RAM. Row-wise, so the bits are those of the first time."""
        g = self._pool.geometry
        for slots, page_row, at, rows in plan.repack:
            packed = [c.pack(a[at : at + rows]) for c, a in zip(g.codecs, scratch, strict=True)]
            mx.eval(packed)
            self._pool.arena.write_packed(slots, packed, page_row)

    def _load_on_device(self, plan: RestorePlan, arena: DeviceArena) -> None:
        """Discrete GPU: MLX loads the files into device memory while the reader threads check the same bytes.

        The arena is written before the check is over; the pages get these slots only when it passed.
        """
        g = self._pool.geometry
        rows: dict[tuple[int, bool], list[mx.array]] = {}
        try:
            files = {e: mx.load(str(self._store.path(e))) for e, _ in plan.runs}
            for key, runs in plan.runs.items():
                name = "raw" if key[1] else "packed"
                rows[key] = [_take(files[key[0]][f"{name}.{layer}"], runs) for layer in range(g.layers)]
            mx.eval(*rows.values())
        except (OSError, KeyError, RuntimeError, ValueError):
            return  # the reader threads find the same damage and report it
        scratch = [mx.zeros((plan.scratch_rows, w), mx.uint32) for w in g.raw_words]
        for key, runs in plan.runs.items():
            at = 0
            for run in runs:
                part = [r[at : at + run.rows] for r in rows[key]]
                at += run.rows
                if run.to == "packed":
                    arena.write_packed_rows(run.at, part)
                elif run.to == "raw":
                    arena.write_raw_rows(run.slot, run.at, part)
                else:
                    scratch = [mx.slice_update(s, p, mx.array([run.at]), [0]) for s, p in zip(scratch, part, strict=True)]
        self._repack(plan, scratch)


def _take(rows: mx.array, runs: list[Run]) -> mx.array:
    """The rows of `runs`, one after the other; the array itself when they are all of it in order."""
    total = sum(r.rows for r in runs)
    if total == rows.shape[0] and all(a.extent_row + a.rows == b.extent_row for a, b in zip(runs, runs[1:], strict=False)):
        return rows
    return rows[mx.array(np.concatenate([np.arange(r.extent_row, r.extent_row + r.rows) for r in runs]))]
