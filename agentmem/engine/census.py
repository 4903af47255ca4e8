"""The census: what agents are known, where their state lies, and what it takes. Engine thread only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from agentmem.blockpool.page import Page, bytes_by_extent
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.engine.memory import Agent, Memory
from agentmem.engine.request import AgentInfo, State


class Census:
    """Figures of agents. `rate` gives this machine's prefill in tokens per millisecond, None while it is not measured."""

    def __init__(
        self, memory: Memory, pool: Pool, store: Store, model: str, rate: Callable[[], float | None]
    ) -> None:
        self._memory, self._pool, self._store = memory, pool, store
        self._model, self._rate = model, rate

    def agents(self, namespace: str) -> list[AgentInfo]:
        """All agents of a namespace, by name."""
        return self._infos(self._memory.agents(namespace))

    def agent(self, agent: Agent) -> AgentInfo:
        return self._infos([agent])[0]

    def bytes(self) -> dict[str, Any]:
        """Rows on disk: `unique` once each, `without_sharing` once for every agent that uses them, and by namespace."""
        owned = {a: a.pages() for a in self._memory.agents()}
        spaces: dict[str, dict[str, int]] = {}
        for agent, pages in owned.items():
            space = spaces.setdefault(agent.row.namespace, {"agents": 0, "without_sharing_bytes": 0})
            space["agents"] += 1
            space["without_sharing_bytes"] += self._rows(pages)
        for name, space in spaces.items():
            pages = [p for a, mine in owned.items() if a.row.namespace == name for p in mine]
            space["unique_bytes"] = self._rows(dict.fromkeys(pages))
        return {
            "unique_bytes": sum(s["unique_bytes"] for s in spaces.values()),
            "without_sharing_bytes": sum(s["without_sharing_bytes"] for s in spaces.values()),
            "namespaces": spaces,
        }

    def _infos(self, agents: list[Agent]) -> list[AgentInfo]:
        owned = {a: a.pages() for a in self._memory.agents()}
        users = Counter(p for pages in owned.values() for p in pages)
        used = self._in_extents(p for pages in owned.values() for p in pages)
        return [self._info(a, owned[a], users, used) for a in agents]

    def _info(self, agent: Agent, pages: list[Page], users: Counter[Page], used: dict[int, int]) -> AgentInfo:
        g, totals, rate = self._pool.geometry, agent.row.totals, self._rate()
        slots = {s for p in pages for s in p.slots or ()}
        cached = int(totals.get("cached_tokens", 0))
        unique = self._rows(p for p in pages if users[p] == 1)
        return AgentInfo(
            agent=agent.row.name,
            namespace=agent.row.namespace,
            model=self._model,
            state=state_of(pages),
            sessions=sorted(agent.spoken),
            tokens=sum(s.conversation.length for s in agent.spoken.values()),
            turns=int(totals.get("turns", 0)),
            ram_bytes=len(slots) * g.slot_bytes,
            disk_bytes=self._disk_bytes(agent, pages, used),
            unique_bytes=unique,
            shared_bytes=self._rows(pages) - unique,
            fp16_bytes=sum(p.rows for p in pages) * g.raw_row_bytes,
            prompt_tokens=int(totals.get("prompt_tokens", 0)),
            cached_tokens=cached,
            saved_ms=cached / rate if rate else None,
            created=agent.row.created,
            last_used=agent.row.last_used,
            pinned=agent.pinned,
            keep_until=agent.keep_until or None,
            persist=agent.persist,
            reuse=agent.reuse,
            planner=agent.planner,
            policy=agent.memory.model_dump(),
            quota_bytes=agent.row.policy.get("quota_bytes"),
            encrypted=agent.encrypted,
            locked=agent.locked,
            lineage={k: v for k, v in agent.row.lineage.items() if k in ("parent", "session", "turn")}
            or None,
        )

    def _rows(self, pages: Iterable[Page]) -> int:
        """Bytes of the rows of `pages` on disk."""
        return sum(self._in_extents(pages).values())

    def _in_extents(self, pages: Iterable[Page]) -> dict[int, int]:
        return bytes_by_extent(pages, self._pool.geometry.row_bytes)

    def _disk_bytes(self, agent: Agent, pages: list[Page], used: dict[int, int]) -> int:
        """The agent's share of the extents that its pages lie in, by rows, plus its token log and its rows in the index.

        Rows that several agents use are charged in equal parts of what all of them use; rows that no session uses any more
        fall to those who use the rest of their extent.
        """
        mine = self._in_extents(pages)
        share = sum(self._store.size_of(e) * n / used[e] for e, n in mine.items())
        index_rows = sum(4 * p.rows + 64 + 32 * len(p.pieces or ()) for p in pages)
        logs = sum(s.log_bytes for s in agent.sessions.values())
        return round(share) + index_rows + logs if agent.persist else 0


def state_of(pages: list[Page]) -> State:
    """`hot`: all in RAM; `warm`: the rest is on disk; `cold`: there is none."""
    if not pages:
        return "cold"
    return "hot" if all(p.slots is not None for p in pages) else "warm"
