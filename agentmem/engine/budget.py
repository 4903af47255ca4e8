"""Disk budgets: how much state is kept on disk, and whose goes first."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agentmem.blockpool.page import Page, bytes_by_extent
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.reclaim import Reclaim
from agentmem.blockpool.store import Store
from agentmem.engine.journal import Done
from agentmem.engine.memory import Agent, Memory

log = logging.getLogger(__name__)

DISK, FLOOR = "disk_budget", "disk_floor"
"""The settings that hold for the whole store, as they are named in what is exceeded."""
ROOM = 10
"""A tenth of the limit is freed beyond what is needed, so that not every turn has to."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes; None means no limit. `half_life` in seconds: state that was not used for so long counts half."""

    disk: int | None
    floor: int
    agent: int | None
    namespace: int | None
    half_life: float


class Budget:
    """Keeps the disk within its limits after every commit. Tokens and lineage always stay: what goes is state, which then is
    computed anew. Engine thread only.
    """

    def __init__(self, memory: Memory, pool: Pool, store: Store, limits: Limits) -> None:
        self._memory, self._pool, self._store, self.limits = memory, pool, store, limits
        self._evicting = False
        self._foreign = True
        self.evicted_bytes = 0
        self.exceeded: str | None = None
        store.floor = limits.floor
        memory.journal.settled = self.enforce

    def enforce(self, agent: Agent) -> None:
        """Called when a turn of `agent` is on disk: drop what exceeds a limit."""
        if self._evicting or self._memory.unwritten:
            return
        exceeded = None
        for name, limit, over, pages in self._violations(agent):
            if over <= 0:
                continue
            need = over + limit // ROOM
            if self._foreign and name in (DISK, FLOOR):
                self._evict_foreign(need, agent)
                return
            chosen, size = self._reclaim(pages()).until(need, self._store.size_of)
            if size < over:
                exceeded = name
                log.warning("%s is exceeded by %d bytes that are pinned, shared or in use", name, over - size)
            if chosen:
                self._evict(chosen)
                break
        self.exceeded = exceeded

    def _violations(self, agent: Agent) -> Iterable[tuple[str, int, int, Any]]:
        """(limit's name, its bytes, bytes beyond it, what may go) of every limit that applies."""
        limits = self.limits
        quota = agent.row.policy.get("quota_bytes") or limits.agent
        if quota:
            yield (
                f"quota of agent {agent.row.name}",
                quota,
                self._rows(agent.pages()) - quota,
                lambda: self._own(agent),
            )
        if limits.namespace:
            name = agent.row.namespace
            used = self._rows(self._pages_of(name))
            yield (
                f"quota of namespace {name}",
                limits.namespace,
                used - limits.namespace,
                lambda: self._pages_of(name),
            )
        everything = self._all_pages
        if limits.disk:
            yield DISK, limits.disk, self._store.disk_bytes - limits.disk, everything
        yield FLOOR, limits.floor, limits.floor - self._store.free_disk(), everything

    def _own(self, agent: Agent) -> list[Page]:
        """Pages that no other agent uses."""
        others = {p for a in self._memory.agents() if a is not agent for p in a.pages()}
        return [p for p in agent.pages() if p not in others]

    def _pages_of(self, namespace: str) -> list[Page]:
        spaces = {a.row.space for a in self._memory.agents(namespace)} | {namespace}
        return [p for t in self._pool.trees() if t.namespace in spaces for p in t.pages()]

    def _all_pages(self) -> list[Page]:
        return [p for t in self._pool.trees() for p in t.pages()]

    def _rows(self, pages: Iterable[Page]) -> int:
        return sum(bytes_by_extent(pages, self._pool.geometry.row_bytes).values())

    def _reclaim(self, pages: list[Page]) -> Reclaim:
        return Reclaim(
            pages, kept=self._memory.pinned_pages(), half_life=self.limits.half_life, now=time.monotonic(),
            row_bytes=self._pool.geometry.row_bytes,
        )  # fmt: skip

    def _evict(self, pages: list[Page]) -> None:
        self._evicting = True

        def done(freed: int, error: Exception | None) -> None:
            self._evicting = False
            self.evicted_bytes += freed

        self._memory.drop(pages, done)

    def _evict_foreign(self, need: int, agent: Agent) -> None:
        """State of other models or formats, which is of no use now, goes before any that is."""
        self._evicting = True

        def done(freed: int, error: Exception | None) -> None:
            self._evicting = False
            self.evicted_bytes += freed
            self._foreign = freed > 0
            self.enforce(agent)

        self._store.evict_foreign(need, done)

    def prune(self, older: float, namespace: str | None, dry_run: bool, done: Done) -> dict[str, Any]:
        """Drop the state of agents that were not used for `older` seconds, and state that no session leads to.

        Pinned agents stay. Returns what goes: `{"agents", "bytes"}`; `done(bytes freed, error)` when it is gone. Precondition:
        nothing is being written.
        """
        now = time.time()
        agents = self._memory.agents(namespace)
        young = [
            a for a in self._memory.agents() if a not in agents or a.held or now - a.row.last_used < older
        ]
        kept = {p for a in young for p in a.pages()}
        pages = self._all_pages() if namespace is None else self._pages_of(namespace)
        reclaim = Reclaim(
            pages, kept=kept, half_life=self.limits.half_life, now=time.monotonic(), row_bytes=lambda _: 1
        )
        chosen, size = reclaim.until(1 << 62, self._store.size_of)
        gone = set(chosen)
        names = sorted(a.row.name for a in agents if a not in young and any(p in gone for p in a.pages()))
        if dry_run or not chosen:
            done(0, None)
        else:
            self._memory.drop(chosen, done)
        return {"agents": names, "bytes": size, "pages": len(chosen), "dry_run": dry_run}
