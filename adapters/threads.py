"""What the daemon remembers of a framework's threads: warmed, forked and forgotten with them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

from agentmem.adapters.naming import legal_name, thread_session
from agentmem.client import AgentMemClient, DaemonNotRunning
from agentmem.errors import AgentMemError, AlreadyExists, NotFound

Info = dict[str, Any]


class Fork(NamedTuple):
    """An agent to fork, the session it goes on from (None: its only one), and the new agent's name."""

    agent: str
    session: str | None
    new: str


class Threads:
    """A daemon's memory of threads. Without `url` it is the daemon that holds `home`, looked for when it is needed.

    A thread is a session of each agent that speaks in it. The daemon forks whole agents, so the memory of a copied
    thread is kept by agents named `agent@thread`. Nobody speaks as these: they hold the state that the copy begins
    with, and say where it came from, while the copy itself is a new session of the agents it always had.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, home: str | Path | None = None
    ) -> None:
        self._where = (url, token, home)
        self._client: AgentMemClient | None = None

    def warm(self, agent: str | None) -> None:
        """Bring an agent's state into RAM. A hint: whatever is in its way, the turn itself will tell."""
        if agent is None:
            return
        try:
            self._daemon().warm(legal_name(agent))
        except AgentMemError as error:
            self._let_go(error)

    def fork(self, source: object, target: object) -> list[str]:
        """Keep the state of `source` for its copy `target`; returns the new agents. Without a daemon there is nothing to keep."""
        made = []
        try:
            client = self._daemon()
            for fork in forks(client.agents(), source, target):
                try:
                    client.fork(fork.agent, fork.new, session=fork.session)
                    made.append(fork.new)
                except (AlreadyExists, NotFound):
                    continue
        except DaemonNotRunning as error:
            self._let_go(error)
        return made

    def forget(self, thread: object) -> list[str]:
        """Forget the agents that speak in no other thread, and what was kept for a copy; returns their names.

        Of an agent of several threads, only what it said in this one goes. Raises DaemonNotRunning.
        """
        gone = []
        try:
            client = self._daemon()
            agents = client.agents()
            whole, session = owned(agents, thread), thread_session(thread)
            for info in agents:
                name = info["agent"]
                try:
                    if name in whole:
                        client.forget(name)
                        gone.append(name)
                    elif _speaks(info, session):
                        client.forget(name, session=session)
                except NotFound:
                    continue
        except DaemonNotRunning as error:
            self._let_go(error)
            raise
        return gone

    # One client of threads serves every event loop; a client of asyncio would be tied to the first.

    async def awarm(self, agent: str | None) -> None:
        """See `warm`."""
        await asyncio.to_thread(self.warm, agent)

    async def afork(self, source: object, target: object) -> list[str]:
        """See `fork`."""
        return await asyncio.to_thread(self.fork, source, target)

    async def aforget(self, thread: object) -> list[str]:
        """See `forget`."""
        return await asyncio.to_thread(self.forget, thread)

    def _daemon(self) -> AgentMemClient:
        if self._client is None:
            self._client = AgentMemClient(*self._where)
        return self._client

    def _let_go(self, error: AgentMemError) -> None:
        """After a restart the daemon may listen elsewhere."""
        if isinstance(error, DaemonNotRunning):
            self._client = None


def forks(agents: list[Info], source: object, target: object) -> list[Fork]:
    """What a copy of the thread `source` needs, by the daemon's list of agents."""
    session = thread_session(source)
    wanted = []
    for info in agents:
        name = info["agent"]
        if _speaks(info, session):
            wanted.append(Fork(name, session, _kept_for(name, target)))
        elif _keeps(info, source):
            wanted.append(Fork(name, None, _kept_for(name, target)))
    return wanted


def owned(agents: list[Info], thread: object) -> list[str]:
    """The agents that go when the thread goes."""
    session = thread_session(thread)
    return [
        info["agent"]
        for info in agents
        if _keeps(info, thread) or (info["sessions"] == [session] and _speaks(info, session))
    ]


def _speaks(info: Info, session: str) -> bool:
    """Whether the agent speaks in the thread; a fork only inherited the session that it went on from."""
    return session in info["sessions"] and (info["lineage"] or {}).get("session") != session


def _keeps(info: Info, thread: object) -> bool:
    """Whether the agent was made for a copy."""
    parent = (info["lineage"] or {}).get("parent")
    return parent is not None and info["agent"] == _kept_for(parent, thread)


def _kept_for(agent: str, thread: object) -> str:
    return legal_name(f"{agent}@{thread_session(thread)}")
