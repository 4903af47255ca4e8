"""Order: who is served first, so that small work is quick, agents get equal shares, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Generic, Protocol, TypeVar


class Candidate(Protocol):
    """A request that wants to be served. `arrived` is in seconds of any clock that all candidates share."""

    @property
    def agent_key(self) -> Hashable:
        """Whose share it counts against."""
        ...

    @property
    def arrived(self) -> float: ...

    @property
    def remaining(self) -> int:
        """Tokens of the prompt that are still to be fed; at least 1 while it is prefilled."""
        ...

    @property
    def history(self) -> int:
        """Tokens that it has state for."""
        ...


C = TypeVar("C", bound=Candidate)


class Shares:
    """What each agent was served while others wanted to be, as virtual time (start-time fair queueing).

    An agent that comes back begins at the floor: being away earns nothing, and being alone costs nothing.
    """

    def __init__(self) -> None:
        self._served: dict[Hashable, float] = {}
        self._floor = 0.0

    def present(self, agents: Collection[Hashable]) -> None:
        """These agents want to be served now."""
        known = [self._served[a] for a in agents if a in self._served]
        self._floor = max(self._floor, min(known, default=self._floor))
        self._served = {a: v for a, v in self._served.items() if v > self._floor or a in agents}
        for agent in agents:
            self._served[agent] = max(self._served.get(agent, self._floor), self._floor)

    def charge(self, agent: Hashable, cost: float) -> None:
        self._served[agent] = self._served.get(agent, self._floor) + cost

    def lead(self, agent: Hashable) -> float:
        """How much more this agent was served than the one that was served least."""
        return self._served.get(agent, self._floor) - self._floor


class Order(Generic[C]):
    """Ranks candidates: least rest of work plus lead of the agent first. But when the one that came first was left out
    `patience` times in a row, it is due: nobody comes before it.
    """

    def __init__(self, patience: int, shares: Shares) -> None:
        self.patience = patience
        self.shares = shares
        self._oldest: C | None = None
        self._left_out = 0

    def ranked(self, candidates: Sequence[C], cost: Callable[[C], float]) -> list[C]:
        """The candidates, the first to be served first. `cost` is the rest of a candidate's work.

        Precondition: the shares know that their agents are present.
        """
        oldest = min(candidates, key=lambda c: c.arrived, default=None)
        if oldest is not self._oldest:
            self._oldest, self._left_out = oldest, 0

        def rank(candidate: C) -> tuple[bool, float, float]:
            work = cost(candidate) + self.shares.lead(candidate.agent_key)
            return not self.due(candidate), work, candidate.arrived

        return sorted(candidates, key=rank)

    def due(self, candidate: C) -> bool:
        """Whether nobody may come before this one."""
        return candidate is self._oldest and self._left_out >= self.patience

    def chosen(self, served: Collection[C]) -> None:
        """These of the ranked candidates are served now."""
        if served:
            self._left_out = 0 if self._oldest in served else self._left_out + 1
