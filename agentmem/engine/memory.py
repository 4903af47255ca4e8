"""Who remembers what: agents and their sessions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from agentmem.blockpool.index import AgentRow, Index, SessionRow, TurnRow
from agentmem.blockpool.lookup import collector_paused
from agentmem.blockpool.page import Match, Page, match_chain
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.blockpool.vault import Locked, Where
from agentmem.engine.agents import HIDDEN, Agent, Session, encryption, locked, log_bytes
from agentmem.engine.conversation import Conversation, Tokenizer
from agentmem.engine.journal import Done, Ids, Journal, dropped_heads
from agentmem.engine.request import Parent
from agentmem.errors import AlreadyExists, BadRequest, NotFound, StoreError

__all__ = ["Agent", "Memory", "Session", "locked"]

Encrypt = Literal["off"] | Where


class Memory:
    """Agents and sessions of one home. Engine thread only."""

    def __init__(self, store: Store, pool: Pool, tokenizer: Tokenizer, encrypt: Encrypt = "off") -> None:
        self.store = store
        self.encrypt = encrypt
        self.pool = pool
        self.ids = Ids()
        self.journal = Journal(store, pool, self.ids)
        self.reserved: set[tuple[str, str]] = set()
        self._tokenizer = tokenizer
        self._agents: dict[tuple[str, str], Agent] = {}
        pool.protected = self.pinned_pages

    def load(self) -> None:
        """Read agents, token logs and page trees from the index. Called once, before any request."""
        with collector_paused():
            self._load()

    def _load(self) -> None:
        index = self.store.index
        self.ids.start(index.last_ids())
        pages: dict[int, Page] = {}
        for namespace in index.namespaces():
            pages |= self.pool.load(namespace, list(index.pages(namespace)))
        agents = {row.id: Agent(row) for row in index.agents()}
        for row in index.sessions():
            session = Session(row, Conversation(self._tokenizer))
            session.replay()
            session.move_head(pages.get(row.head) if row.head is not None else None)
            session.stored_head = session.head
            agents[row.agent].sessions[row.name] = session
        self._agents = {(a.row.namespace, a.row.name): a for a in agents.values()}
        for agent in agents.values():
            agent.made = not agent.sessions
            agent.locked = any(s.row.locked for s in agent.sessions.values()) or not self._opens(agent)
        self._date_pages()

    def _opens(self, agent: Agent) -> bool:
        """Whether the key of an agent's space is there, where it needs one."""
        try:
            if self.store.vaults is not None:
                self.store.vaults.seal(agent.row.space)
        except Locked:
            return False
        return True

    def _date_pages(self) -> None:
        """Pages were last used when the last of their agents was."""
        offset = time.monotonic() - time.time()
        for agent in self._agents.values():
            for page in agent.pages():
                page.last_used = max(page.last_used, agent.row.last_used + offset)

    def agent(self, namespace: str, name: str) -> Agent | None:
        return self._agents.get((namespace, name))

    def find(self, namespace: str, name: str) -> Agent:
        """The same; raises NotFound."""
        agent = self._agents.get((namespace, name))
        if agent is None:
            raise NotFound(
                f"no agent {name!r} in namespace {namespace!r}; `agentmem agents` lists them", param="agent"
            )
        return agent

    def agents(self, namespace: str | None = None) -> list[Agent]:
        return [a for (ns, _), a in sorted(self._agents.items()) if namespace in (None, ns)]

    def encryption(self) -> dict[str, Any]:
        """How new agents are kept, how many agents are kept how, and how many of them are locked."""
        return {"new_agents": self.encrypt, **encryption(self.agents())}

    def pinned_pages(self) -> set[Page]:
        """The pages of pinned agents."""
        return {p for a in self._agents.values() if a.held for p in a.pages()}

    def open(
        self, namespace: str, agent: str, session: str, persist: bool | None = None,
        parents: tuple[Parent, ...] = (),
    ) -> tuple[Agent, Session]:  # fmt: skip
        """The agent and its session, made now where they do not exist; only a committed turn makes them last.

        Raises AlreadyExists while an agent of this name is being imported, BadRequest when `persist` is not what the agent has,
        AgentLocked when its key is not there, StoreError when a new one cannot be kept.
        """
        self._check_free(namespace, agent)
        owner = self._agents.get((namespace, agent))
        if owner is None:
            policy: dict[str, Any] = {} if persist is not False else {"persist": False}
            owner = self._new(namespace, agent, policy, self.encrypt if persist is not False else "off")
            owner.row.lineage |= self._lineage(namespace, parents)
        elif owner.locked:
            raise locked(agent)
        elif persist is not None and persist != owner.persist:
            raise BadRequest(
                f"agent {agent!r} was made with persist={str(owner.persist).lower()}; leave persist out, or forget it first",
                param="persist",
            )
        if session not in owner.sessions:
            row = SessionRow(self.next_id("sessions"), owner.row.id, session, None)
            owner.sessions[session] = Session(row, Conversation(self._tokenizer))
        return owner, owner.sessions[session]

    def _lineage(self, namespace: str, parents: tuple[Parent, ...]) -> dict[str, Any]:
        """Of an agent that goes on from the first of `parents` that there is. What both say is shared because it is equal."""
        for name, session in parents:
            parent = self._agents.get((namespace, name))
            if parent is None or (session is not None and session not in parent.sessions):
                continue
            latest = max(parent.spoken.values(), key=lambda s: s.conversation.turns, default=None)
            one = parent.sessions[session] if session is not None else latest
            if one is not None:
                return {"parent": name, "session": one.row.name, "turn": one.conversation.turns}
        return {}

    def _new(self, namespace: str, name: str, policy: dict[str, Any], encrypt: Encrypt) -> Agent:
        now = time.time()
        lineage = {} if encrypt == "off" else {"space": self.new_vault(namespace, encrypt)}
        agent = Agent(AgentRow(self.next_id("agents"), namespace, name, now, now, {}, policy, lineage))
        self._agents[namespace, name] = agent
        return agent

    def new_vault(self, namespace: str, where: Where) -> str:
        """A space with a key of its own. Raises StoreError when there is no place for keys."""
        if self.store.vaults is None:
            raise StoreError("this store keeps no keys")
        try:
            return self.store.vaults.make(namespace, where)
        except OSError as error:
            raise StoreError(f"a key for the agent cannot be kept: {error}") from error

    def _check_free(self, namespace: str, agent: str) -> None:
        if (namespace, agent) in self.reserved:
            raise AlreadyExists(
                f"agent {agent!r} is being imported; try again when that is over", param="agent"
            )

    def attach(self, agent: Agent, heads: dict[str, Page | None]) -> None:
        """Take in an agent that the index knows; `heads` has the last page of each session."""
        self._agents[agent.row.namespace, agent.row.name] = agent
        for name, session in agent.sessions.items():
            session.move_head(heads[name])
            session.stored_head = session.head

    def close_unused(self, agent: Agent, session: Session) -> None:
        """Forget a session, and an agent, that never got a turn."""
        if session.conversation.turns == 0 and not session.busy:
            agent.sessions.pop(session.row.name, None)
            if not agent.sessions and not agent.made:
                self._agents.pop((agent.row.namespace, agent.row.name), None)

    def next_id(self, table: str) -> int:
        """The id of a new row of `agents`, `sessions`, `pages` or `extents`."""
        return self.ids.next(table)

    def match(self, agent: Agent, session: Session, ids: list[int]) -> Match:
        """The longest prefix of `ids` with state: the session's own where it is as long as any other's of the agent's space."""
        wanted = np.fromiter(ids, np.int32, len(ids))  # faster than np.array
        own = match_chain(session.head, wanted) if session.head is not None else Match([], 0, 0)
        if own.tokens == len(wanted):
            return own
        shared = self.pool.tree(agent.row.space).match(wanted)
        return own if own.tokens >= shared.tokens else shared

    def finish(self, agent: Agent, session: Session, turn: TurnRow, head: Page | None, done: Done) -> None:
        """A turn ended with state up to `head`: queue its commit. `done(bytes written, error)` runs on the engine thread.

        The turn of an agent that does not persist stays in RAM; `done` hears of no bytes and no error.
        """
        agent.row.last_used = time.time()
        self._log(agent, session, turn, head, done)

    def _log(self, agent: Agent, session: Session, turn: TurnRow, head: Page | None, done: Done) -> None:
        turn.created = time.time()
        session.row.turns.append(turn)
        session.log_bytes += log_bytes(turn)
        session.move_head(head)
        if agent.persist:
            self.journal.add(agent, session, turn, head, done)
        else:
            self.journal.keep_in_ram(head)
            done(0, None)

    def leave_ram(self, agent: Agent, pages: Iterable[Page]) -> None:
        """Take pages of an agent out of RAM that are on disk, in nobody's use, and no other agent's too."""
        others = {p for a in self._agents.values() if a is not agent for p in a.pages()}
        for page in pages:
            if page.slots is not None and page.pieces is not None and not page.pins and page not in others:
                self.pool.evict(page)

    def hidden(self, agent: Agent, name: str) -> Session:
        """A hidden session of the agent, made now where it does not exist; what is noted in it makes it last."""
        if name not in agent.sessions:
            row = SessionRow(self.next_id("sessions"), agent.row.id, name, None)
            agent.sessions[name] = Session(row, Conversation(self._tokenizer))
        return agent.sessions[name]

    def note(
        self, agent: Agent, session: Session, stats: dict[str, Any], head: Page | None, done: Done
    ) -> None:
        """Log something of a hidden session that is no turn of the agent's, with state up to `head`; `done` as in `finish`."""
        assert session.hidden
        turn = TurnRow(session.conversation.turns + 1, 0, 0, np.zeros(0, np.int32), [], [], stats, 0.0)
        session.conversation.apply(turn)
        self._log(agent, session, turn, head, done)

    @property
    def unwritten(self) -> int:
        """Turns whose commit has not ended."""
        return self.journal.unwritten

    def create(self, namespace: str, name: str, policy: dict[str, Any], done: Done) -> Agent:
        """An agent without turns. `done(0, error)` once it is on disk. Raises AlreadyExists."""
        self._check_new(namespace, name)
        encrypt = policy.pop("encrypt", self.encrypt)
        agent = self._new(namespace, name, {}, encrypt if policy.get("persist", True) else "off")
        agent.made = True
        self.set_policy(agent, policy, done)
        return agent

    def _check_new(self, namespace: str, name: str) -> None:
        self._check_free(namespace, name)
        if (namespace, name) in self._agents:
            raise AlreadyExists(
                f"agent {name!r} exists; choose another name or forget it first", param="agent"
            )

    def session(self, agent: Agent, name: str | None) -> Session:
        """A session by name, or the one used last; raises NotFound."""
        if name is None and agent.spoken:
            return max(agent.spoken.values(), key=lambda s: s.row.turns[-1].created if s.row.turns else 0.0)
        if name is None or name not in agent.spoken:
            raise NotFound(f"agent {agent.row.name!r} has no session {name!r}", param="session")
        return agent.sessions[name]

    def set_policy(self, agent: Agent, changes: dict[str, Any], done: Done) -> None:
        """Change an agent's policy; `done(0, error)` once it is on disk."""
        agent.row.policy = {**agent.row.policy, **changes}
        if not agent.persist:
            done(0, None)
            return
        row = agent.row
        self.store.change(lambda index: index.update_agent(row), lambda error: done(0, error))

    def fork(self, parent: Agent, session: Session, name: str, at: int | None, done: Done) -> Agent:
        """A new agent that goes on from `session` as it was after turn `at` (default: its last). Nothing is copied.

        `done(0, error)` once it is on disk. Raises AlreadyExists, or BadRequest for a turn that never was.
        Preconditions: the session is idle, and its turns are written.
        """
        if parent.locked:
            raise locked(parent.row.name)
        namespace, turns = parent.row.namespace, session.row.turns
        last = session.conversation.turns
        self._check_new(namespace, name)
        at = last if at is None else at
        if not 1 <= at <= last:
            raise BadRequest(f"session {session.row.name!r} has turns 1 to {last}; got at={at}", param="at")
        now = time.time()
        lineage = {"parent": parent.row.name, "session": session.row.name, "turn": at}
        if "space" in parent.row.lineage:
            lineage["space"] = parent.row.space
        row = AgentRow(
            self.next_id("agents"), namespace, name, now, now, {}, dict(parent.row.policy), lineage
        )
        own = SessionRow(
            self.next_id("sessions"), row.id, session.row.name, None, session.row.id, at, session.row.text,
            [t for t in turns if t.n <= at],
        )  # fmt: skip
        fork = Session(own, Conversation(self._tokenizer))
        fork.replay()
        head = session.head if at == last else self._state_at(parent, fork)
        agent = Agent(row, {own.name: fork})
        self.attach(agent, {own.name: head})
        own.head = head.id if head is not None else None
        if agent.persist:
            self.store.change(lambda index: _fork(index, row, own), lambda error: done(0, error))
        else:
            done(0, None)
        return agent

    def _state_at(self, parent: Agent, fork: Session) -> Page | None:
        """The last page of the state that an earlier turn ended with; it may hold rows of what came after."""
        match = self.pool.tree(parent.row.space).match(fork.conversation.ids)
        return match.pages[-1] if match.pages else None

    def forget(self, agent: Agent, done: Done) -> None:
        """Delete the agent, its log, and every page that only it uses. Bytes in RAM are free at once.

        Pages that no session of the namespace leads to go too: they may be what the agent said before it was edited.
        """
        agent.forgotten = True
        del self._agents[agent.row.namespace, agent.row.name]
        for session in agent.sessions.values():
            session.move_head(None)
        gone = self._discard_unused(agent)
        if agent.persist:
            last = not any(a.row.space == agent.row.space for a in self._agents.values())
            self.store.forget(agent.row.id, gone, done, agent.row.space if last else None)
        else:
            done(0, None)

    def forget_session(self, agent: Agent, session: Session, done: Done) -> None:
        """The same for one session and what is hidden behind it; the agent stays, even without any."""
        name = session.row.name
        gone = [s for n, s in agent.sessions.items() if n == name or n.startswith(f"{name}{HIDDEN}")]
        for one in gone:
            one.move_head(None)
            del agent.sessions[one.row.name]
        agent.made = agent.made or not agent.sessions
        pages = self._discard_unused(agent)
        if agent.persist:
            self.store.forget(agent.row.id, pages, done, sessions=[s.row.id for s in gone])
        else:
            done(0, None)

    def _discard_unused(self, agent: Agent) -> list[int]:
        """Take the pages of an agent's space that nobody uses out of RAM and tree; returns the ids of those on disk."""
        pages = sorted(self.pool.tree(agent.row.space).pages(), key=lambda p: -p.start)
        gone = [page.id for page in pages if self.journal.discard_if_unused(page) and page.id is not None]
        self.journal.forget_buried()
        return gone

    def lose(self, bad: dict[int, str]) -> None:
        """Extents turned out damaged: put them aside, drop the pages whose rows were in them, shorten the sessions' state."""
        hit = [
            p
            for t in self.pool.trees()
            for p in t.pages()
            if p.pieces and any(x.extent in bad for x in p.pieces)
        ]
        bare = [p.id for p in hit if p.slots is not None and p.id is not None]
        lost: dict[Page, None] = {}
        for page in hit:
            page.pieces = None
            if page.slots is None:
                lost[page] = None
                lost.update(dict.fromkeys(page.walk()))
        heads: dict[int, int | None] = {}
        for session in self._sessions():
            if session.head in lost:
                keep = [p for p in session.head.chain() if p not in lost]
                session.move_head(keep[-1] if keep else None)
                session.stored_head, session.damaged = session.head, True
                heads[session.row.id] = session.head.id if session.head is not None else None
        gone = [p.id for p in lost if p.id is not None]
        self.journal.condemn(list(lost))
        self.store.quarantine(bad, gone, bare, heads)

    def drop(self, pages: list[Page], done: Done) -> None:
        """Take pages off the disk, `done(bytes freed, error)`. Precondition: all pages behind them are among them.

        Those in RAM stay there until room is needed; their agents go on. Tokens are kept.
        """
        ids = [p.id for p in pages if p.id is not None]
        for page in pages:
            page.pieces, page.volatile = None, True
        heads = dropped_heads(self._sessions(), set(pages))
        for page in pages:
            page.id = None
        self.journal.condemn([p for p in pages if p.slots is None])
        self.store.evict(ids, heads, done)

    def _sessions(self) -> list[Session]:
        return [s for a in self._agents.values() for s in a.sessions.values()]


def _fork(index: Index, agent: AgentRow, session: SessionRow) -> None:
    index.fork(agent, session, session.head)
