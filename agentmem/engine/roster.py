"""The roster: what may be done with agents, from any thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from agentmem.blockpool.pool import Pool
from agentmem.engine.budget import Budget
from agentmem.engine.census import Census
from agentmem.engine.engine import Engine
from agentmem.engine.explained import explained
from agentmem.engine.jobs import Jobs
from agentmem.engine.journal import Done
from agentmem.engine.memory import Agent, Memory
from agentmem.engine.request import AgentInfo
from agentmem.episode.policy import Full, memory_policy
from agentmem.errors import AgentMemError, BadRequest, NotFound, Overloaded, StoreError

T = TypeVar("T")

BUSY_SECONDS = 60.0


class Roster:
    """The runtime's verbs on agents. Each runs on the engine thread between steps, and waits for its outcome."""

    _engine: Engine
    _memory: Memory
    _pool: Pool
    _census: Census
    _budget: Budget
    jobs: Jobs

    def agents(self, namespace: str = "default") -> list[AgentInfo]:
        """All agents of a namespace, by name."""
        return self._call(lambda: self._census.agents(namespace))

    def agent(self, name: str, namespace: str = "default") -> AgentInfo:
        """One agent; raises NotFound."""
        return self._call(lambda: self._census.agent(self._memory.find(namespace, name)))

    def warm(self, name: str, namespace: str = "default") -> AgentInfo:
        """Bring from disk into RAM what an agent's next turn starts from. Raises NotFound, or Overloaded when they do not fit."""
        done: Future[AgentInfo] = Future()

        def start() -> None:
            agent = self._memory.find(namespace, name)
            shown = [p for s in agent.spoken.values() for p in self._engine.episodes.likely(agent, s)]
            pages = [p for p in dict.fromkeys(shown) if p.slots is None and p.pieces is not None]
            self._pool.pin(pages)

            def finish(bad: dict[int, str], _: float) -> None:
                self._pool.unpin(pages)
                if bad:
                    self._memory.lose(bad)
                done.set_result(self._census.agent(agent))

            try:
                self._engine.recall.start(pages, finish)
            except AgentMemError:
                self._pool.unpin(pages)
                raise

        self._call(start)
        return done.result()

    def evict(self, name: str, namespace: str = "default") -> AgentInfo:
        """Take an agent's pages out of RAM, those that other agents use excepted. Waits for running turns; raises NotFound."""

        def evict() -> AgentInfo:
            agent = self._memory.find(namespace, name)
            self._memory.leave_ram(agent, agent.pages())
            return self._census.agent(agent)

        return self._when_idle(namespace, name, evict)

    def forget(self, name: str, namespace: str = "default", session: str | None = None) -> dict[str, Any]:
        """Delete an agent, or one of its sessions: token log, index rows, and the bytes that only it uses. Irreversible.

        Raises NotFound. What composed reuse has learned of an agent goes with the agent only. Its jobs end.
        """
        self.jobs.forget(namespace, name, session)
        done: Future[dict[str, Any]] = Future()

        def forget() -> None:
            def finish(freed: int, error: Exception | None) -> None:
                if error is not None:
                    done.set_exception(StoreError(f"agent {name!r} could not be deleted from disk: {error}"))
                else:
                    done.set_result({"agent": name, "bytes_freed": freed})

            agent = self._memory.find(namespace, name)
            one = self._memory.session(agent, session) if session is not None else None
            self._engine.episodes.folds.forget(agent)
            if one is not None:
                self._memory.forget_session(agent, one, finish)
                return
            self._engine.composing.forget(namespace, name)
            self._memory.forget(agent, finish)

        self._when_idle(namespace, name, forget)
        return done.result()

    def create(self, name: str, policy: dict[str, Any], namespace: str = "default") -> AgentInfo:
        """A new agent without turns; `policy` as for `set_policy`, and `persist`. Raises AlreadyExists, BadRequest."""
        self._check_policy(policy)
        return self._changed(lambda done: self._memory.create(namespace, name, policy, done))

    def set_policy(self, name: str, changes: dict[str, Any], namespace: str = "default") -> AgentInfo:
        """Change `pinned`, `quota_bytes`, `reuse`, `planner` or `memory` of an agent. Raises NotFound, BadRequest."""
        self._check_policy(changes)

        def change(done: Done) -> Agent:
            agent = self._memory.find(namespace, name)
            before = agent.memory
            self._memory.set_policy(agent, changes, done)
            if agent.memory != before:
                self._engine.episodes.changed(agent)
            return agent

        return self._changed(change)

    def _check_policy(self, policy: dict[str, Any]) -> None:
        """Raises BadRequest for what the layers of the model do not allow."""
        if (planner := policy.get("planner")) is not None:
            self._call(lambda: self._engine.composing.check(planner))
        if self._engine.plain:
            return
        if not isinstance(memory_policy(policy), Full):
            raise BadRequest(
                "this model keeps more than keys and values of every token, so its agents are kept whole; use kind 'full'",
                param="policy",
            )
        if policy.get("reuse") in ("composed", "auto"):
            raise BadRequest(
                "state of this model cannot be moved behind another text; use reuse 'exact' or 'off'",
                param="reuse",
            )

    def fork(
        self,
        name: str,
        new: str,
        session: str | None = None,
        at: int | None = None,
        namespace: str = "default",
    ) -> AgentInfo:
        """A new agent that goes on from a session of `name`, by default the one used last, as it was after turn `at`.

        Nothing is copied; each goes its own way from there. Raises NotFound, AlreadyExists, BadRequest.
        """

        def fork(done: Done) -> Agent:
            parent = self._memory.find(namespace, name)
            agent = self._memory.fork(parent, self._memory.session(parent, session), new, at, done)
            if self._engine.checkpoints is not None:
                self._engine.checkpoints.fork(agent)
            return agent

        return self._when_idle(namespace, name, lambda: self._change(fork))()

    def _changed(self, change: Callable[[Done], Agent]) -> AgentInfo:
        return self._call(lambda: self._change(change))()

    def _change(self, change: Callable[[Done], Agent]) -> Callable[[], AgentInfo]:
        """Start a change of the index on the engine thread; the result waits for it and gives the agent as it then is."""
        written: Future[None] = Future()

        def done(_: int, error: Exception | None) -> None:
            if error is None:
                written.set_result(None)
            else:
                written.set_exception(StoreError(f"this could not be written: {error}"))

        agent = change(done)

        def wait() -> AgentInfo:
            written.result()
            return self._call(lambda: self._census.agent(agent))

        return wait

    def encryption(self) -> dict[str, Any]:
        """How new agents are kept, how many agents are kept how, and how many of them are locked."""
        return self._call(self._memory.encryption)

    def prune(self, older: float, namespace: str | None = None, dry_run: bool = False) -> dict[str, Any]:
        """Drop from disk the state of agents not used for `older` seconds; their tokens stay. See `Budget.prune`."""
        freed: Future[int] = Future()

        def done(size: int, error: Exception | None) -> None:
            if error is None:
                freed.set_result(size)
            else:
                freed.set_exception(StoreError(f"the store could not be pruned: {error}"))

        result = self._when_written(lambda: self._budget.prune(older, namespace, dry_run, done))
        return {**result, "bytes_freed": freed.result()}

    def explain(
        self, name: str, session: str | None = None, namespace: str = "default", turn: int | None = None
    ) -> dict[str, Any]:
        """Why a turn, by default the last, was or was not reused. Raises NotFound."""

        def explain() -> dict[str, Any]:
            sessions = self._memory.find(namespace, name).spoken
            wanted = (
                [sessions[session]] if session in sessions else [] if session else list(sessions.values())
            )
            found = max(
                ((t, s) for s in wanted for t in s.row.turns if turn in (None, t.n)),
                key=lambda one: one[0].created,
                default=None,
            )
            if found is None:
                which = "turn" if turn is None else f"turn {turn}"
                raise NotFound(f"agent {name!r} has no {which} in session {session!r}")
            return explained(name, found[0], found[1].row.turns)

        return self._call(explain)

    def episodes(self, name: str, session: str | None = None, namespace: str = "default") -> dict[str, Any]:
        """What an agent's memory is made of: the episodes of a session, by default the one used last. Raises NotFound."""

        def report() -> dict[str, Any]:
            agent = self._memory.find(namespace, name)
            return self._engine.episodes.report(agent, self._memory.session(agent, session))

        return self._call(report)

    def _call(self, job: Callable[[], T]) -> T:
        """Run `job` on the engine thread and wait for its result."""
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(job())
            except BaseException as error:
                outcome.set_exception(error)

        self._engine.post(run)
        return outcome.result()

    def _when_idle(self, namespace: str, name: str, job: Callable[[], T]) -> T:
        """Run `job` on the engine thread once the agent is not speaking and no turn waits to be written."""

        def speaking() -> bool:
            agent = self._memory.find(namespace, name)
            busy = any(s.busy for s in agent.sessions.values()) or self._engine.folds.reads(agent)
            return busy or not self._engine.prefetch.let_go((namespace, name))

        return self._when_written(
            job, speaking, f"agent {name!r} is still speaking; try again when its reply is over"
        )

    def _when_written(
        self,
        job: Callable[[], T],
        busy: Callable[[], bool] = lambda: False,
        complaint: str = "turns are still being written; try again",
    ) -> T:
        """Run `job` on the engine thread once nothing is being written and `busy` is over. Raises Overloaded."""
        deadline = time.monotonic() + BUSY_SECONDS
        pending = object()

        def attempt() -> T | object:
            return pending if busy() or self._memory.unwritten else job()

        while (result := self._call(attempt)) is pending:
            if time.monotonic() > deadline:
                raise Overloaded(complaint)
            time.sleep(0.02)
        return result  # type: ignore[return-value]
