"""Rows of pages for threads that are not the engine's: a group at a time, from RAM or by way of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import numpy as np

from agentmem.blockpool.arena import Rows
from agentmem.blockpool.page import Page
from agentmem.engine.memory import Memory
from agentmem.engine.recall import Recall
from agentmem.errors import Overloaded, StoreError

T = TypeVar("T")
Collect = Callable[[], tuple[Rows, Rows]]

GROUP_BYTES = 32 << 20
POOL_SHARE = 8
PATIENCE_S = 60.0


class Call(Protocol):
    """Runs a job on the engine thread and waits for its result. Any other thread."""

    def __call__(self, job: Callable[[], T]) -> T: ...


class Fetch:
    """Copies rows out of the arena, in groups that take a small share of it, so that an agent may be larger than RAM.

    All methods may be called from any thread but the engine's.
    """

    def __init__(self, call: Call, memory: Memory, recall: Recall) -> None:
        self._call, self._memory, self._pool, self._recall = call, memory, memory.pool, recall

    def groups(self, pages: Sequence[Page]) -> Iterator[list[Page]]:
        """The pages in order, cut into groups for `rows`."""
        g = self._pool.geometry
        limit = max(1, min(self._pool.slots.count // POOL_SHARE, GROUP_BYTES // g.slot_bytes))
        group, slots = list[Page](), 0
        for page in pages:
            need = g.slots_for(page.raw, page.rows)
            if group and slots + need > limit:
                yield group
                group, slots = [], 0
            group.append(page)
            slots += need
        if group:
            yield group

    def rows(self, pages: list[Page]) -> tuple[Rows, Rows]:
        """Packed rows and raw rows of the pages, one after the other, uint32 [rows, words] per layer.

        Raises StoreError when a page's rows are lost, Overloaded when there is no room for them for a long time.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            outcome: Future[Collect] = Future()
            try:
                self._call(lambda outcome=outcome: self._begin(pages, outcome))  # type: ignore[misc]
                break
            except Overloaded:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        collect = outcome.result()
        try:
            return collect()
        finally:
            self._call(lambda: self._pool.unpin(pages))

    def _begin(self, pages: list[Page], outcome: Future[Collect]) -> None:
        """On the engine thread: bring the pages into RAM, pinned, then hand out a way to copy them."""
        if any(p.slots is None and p.pieces is None for p in pages):
            raise StoreError("state of this agent was lost meanwhile; try again")
        self._pool.pin(pages)
        missing = [p for p in pages if p.slots is None]

        def ready(bad: dict[int, str], _: float) -> None:
            if bad:
                self._pool.unpin(pages)
                self._memory.lose(bad)
                outcome.set_exception(StoreError("state of this agent is damaged on disk; try again"))
            else:
                outcome.set_result(self._collect(pages))

        if not missing:
            ready({}, 0.0)
            return
        try:
            self._recall.start(missing, ready)
        except Overloaded:
            self._pool.unpin(pages)
            raise

    def _collect(self, pages: list[Page]) -> Collect:
        g = self._pool.geometry
        packed, raw = list[Any](), list[Any]()
        for page in pages:
            assert page.slots is not None
            at = np.arange(page.rows)
            if page.raw:
                raw.append(
                    np.asarray(page.slots)[at // g.raw_per_slot] * g.raw_per_slot + at % g.raw_per_slot
                )
            else:
                packed.append(page.slots[0] * g.page_tokens + at)
        none = np.zeros(0, np.int64)
        return self._pool.arena.collect(
            np.concatenate(packed).astype(np.int64) if packed else none,
            np.concatenate(raw).astype(np.int64) if raw else none,
        )
