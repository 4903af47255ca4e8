"""Who remembers what: agents, their sessions, and the way of a finished turn to disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentmem.blockpool.extent import ExtentData
from agentmem.blockpool.index import AgentRow, ExtentRow, SessionRow, TurnCommit, TurnRow
from agentmem.blockpool.page import Match, Page, Piece, match_chain
from agentmem.blockpool.pool import Pool, clip
from agentmem.blockpool.store import Store
from agentmem.engine.conversation import Conversation, Tokenizer
from agentmem.errors import AlreadyExists

Done = Callable[[int, Exception | None], None]


@dataclass(eq=False, slots=True)
class Session:
    """One growing context. `head` is the last page of its state, `stored_head` the one that the index knows.

    `unlogged` are turns whose commit failed; they are written with the next one.
    """

    row: SessionRow
    conversation: Conversation
    head: Page | None = None
    stored_head: Page | None = None
    unlogged: list[TurnRow] = field(default_factory=list)
    busy: bool = False
    log_bytes: int = 0

    def replay(self) -> None:
        """Build the conversation from the log. Precondition: it is empty."""
        for turn in self.row.turns:
            self.conversation.apply(turn)
            self.log_bytes += _log_bytes(turn)


@dataclass(eq=False, slots=True)
class Agent:
    """A named owner of sessions."""

    row: AgentRow
    sessions: dict[str, Session] = field(default_factory=dict)
    forgotten: bool = False


@dataclass(slots=True)
class _Pending:
    agent: Agent
    session: Session
    turn: TurnRow
    head: Page | None
    done: Done


class Memory:
    """Agents and sessions of one home. Engine thread only.

    Turns are committed one at a time, in the order in which they ended, because a turn's pages refer to rows that the turn
    before it wrote.
    """

    def __init__(self, store: Store, pool: Pool, tokenizer: Tokenizer) -> None:
        self.store = store
        self.pool = pool
        self._tokenizer = tokenizer
        self._agents: dict[tuple[str, str], Agent] = {}
        self._queue: deque[_Pending] = deque()
        self._writing = False
        self._zombies: list[Page] = []
        self._ids: dict[str, int] = {}
        self.reserved: set[tuple[str, str]] = set()

    def load(self) -> None:
        """Read agents, token logs and page trees from the index. Called once, before any request."""
        index = self.store.index
        self._ids = index.last_ids()
        pages: dict[int, Page] = {}
        for namespace in index.namespaces():
            pages |= self.pool.load(namespace, list(index.pages(namespace)))
        agents = {row.id: Agent(row) for row in index.agents()}
        for row in index.sessions():
            session = Session(row, Conversation(self._tokenizer))
            session.replay()
            self._move_head(session, pages.get(row.head) if row.head is not None else None)
            session.stored_head = session.head
            agents[row.agent].sessions[row.name] = session
        self._agents = {(a.row.namespace, a.row.name): a for a in agents.values()}

    def agent(self, namespace: str, name: str) -> Agent | None:
        return self._agents.get((namespace, name))

    def agents(self, namespace: str | None = None) -> list[Agent]:
        return [a for (ns, _), a in sorted(self._agents.items()) if namespace in (None, ns)]

    def open(self, namespace: str, agent: str, session: str) -> tuple[Agent, Session]:
        """The agent and its session, made now where they do not exist; only a committed turn makes them last.

        Raises AlreadyExists while an agent of this name is being imported.
        """
        if (namespace, agent) in self.reserved:
            raise AlreadyExists(
                f"agent {agent!r} is being imported; try again when that is over", param="agent"
            )
        owner = self._agents.get((namespace, agent))
        if owner is None:
            now = time.time()
            owner = Agent(AgentRow(self.next_id("agents"), namespace, agent, now, now, {}))
            self._agents[namespace, agent] = owner
        if session not in owner.sessions:
            row = SessionRow(self.next_id("sessions"), owner.row.id, session, None)
            owner.sessions[session] = Session(row, Conversation(self._tokenizer))
        return owner, owner.sessions[session]

    def attach(self, agent: Agent, heads: dict[str, Page | None]) -> None:
        """Take in an agent that the index knows; `heads` has the last page of each session."""
        self._agents[agent.row.namespace, agent.row.name] = agent
        for name, session in agent.sessions.items():
            self._move_head(session, heads[name])
            session.stored_head = session.head

    def close_unused(self, agent: Agent, session: Session) -> None:
        """Forget a session, and an agent, that never got a turn."""
        if session.conversation.turns == 0 and not session.busy:
            agent.sessions.pop(session.row.name, None)
            if not agent.sessions:
                self._agents.pop((agent.row.namespace, agent.row.name), None)

    def next_id(self, table: str) -> int:
        """The id of a new row of `agents`, `sessions`, `pages` or `extents`."""
        self._ids[table] += 1
        return self._ids[table]

    def match(self, agent: Agent, session: Session, ids: list[int]) -> Match:
        """The longest prefix of `ids` with state: the session's own where it is as long as any other's of the agent's space."""
        wanted = np.asarray(ids, dtype=np.int32)
        own = match_chain(session.head, wanted) if session.head is not None else Match([], 0, 0)
        if own.tokens == len(wanted):
            return own
        shared = self.pool.tree(agent.row.space).match(wanted)
        return own if own.tokens >= shared.tokens else shared

    def finish(self, agent: Agent, session: Session, turn: TurnRow, head: Page | None, done: Done) -> None:
        """A turn ended with state up to `head`: queue its commit. `done(bytes written, error)` runs on the engine thread."""
        turn.created = time.time()
        agent.row.last_used = turn.created
        session.row.turns.append(turn)
        session.log_bytes += _log_bytes(turn)
        self._move_head(session, head)
        self._queue.append(_Pending(agent, session, turn, head, done))
        self.pump()

    @property
    def unwritten(self) -> int:
        """Turns whose commit has not ended."""
        return len(self._queue) + int(self._writing)

    def _move_head(self, session: Session, head: Page | None) -> None:
        if session.head is not None:
            session.head.heads -= 1
        session.head = head
        if head is not None:
            head.heads += 1

    def pump(self) -> None:
        """Hand the next queued turn to the writer, when it is idle."""
        self._bury()
        while self._queue and not self._writing:
            pending = self._queue.popleft()
            if pending.agent.forgotten:
                pending.done(0, None)
                continue
            self._write(pending)

    def _write(self, pending: _Pending) -> None:
        """Prepare and submit one commit: the pages of the chain that are not on disk, and the log entry."""
        pending.head = self._last_kept(pending)
        chain = pending.head.chain() if pending.head is not None else []
        new = [p for p in chain if p.pieces is None]
        rows = _Rows(self, new)
        dropped = self._superseded(pending.session, pending.head)
        commit = TurnCommit(
            pending.agent.row, pending.session.row, pending.turn, pending.head,
            pages=list(zip(new, rows.pieces, strict=True)),
            dropped=[p.id for p in dropped if p.id is not None],
            extent=rows.extent, earlier=list(pending.session.unlogged),
        )  # fmt: skip
        self.pool.pin(new)
        self._writing = True

        def done(written: int | None, error: Exception | None) -> None:
            self._writing = False
            self.pool.unpin(new)
            self.pool.lossy = error is not None
            if error is None:
                for page, pieces in zip(new, rows.pieces, strict=True):
                    page.pieces, page.origin = pieces, None
                pending.session.stored_head = pending.head
                pending.session.unlogged.clear()
                self._condemn(dropped)
            else:
                pending.session.unlogged.append(pending.turn)
            pending.done(written or 0, error)
            self.pump()

        self.store.commit(commit, rows.data(pending.agent.row.space), done)

    def _last_kept(self, pending: _Pending) -> Page | None:
        """The turn's head, or the page before the first that left RAM unwritten (possible only after a failed write)."""
        head = pending.head
        for page in head.chain() if head is not None else []:
            if page.slots is None and page.pieces is None:
                head = page.parent if page.parent is not None and page.parent.parent is not None else None
                if pending.session.head is pending.head:
                    self._move_head(pending.session, head)
                break
        return head

    def _condemn(self, pages: list[Page]) -> None:
        """The index has dropped these pages: whoever still uses one writes it again."""
        for page in pages:
            page.pieces, page.id = None, None
        self._zombies.extend(pages)
        self._bury()

    def _bury(self) -> None:
        """Discard condemned pages. One that a running sequence reads, or that a turn ends in, waits until it is free."""
        condemned = [p for p in self._zombies if p.pieces is None]
        self._zombies = []
        for page in sorted(condemned, key=lambda p: -p.start):
            if not self._discard_if_unused(page):
                self._zombies.append(page)

    def _superseded(self, session: Session, head: Page | None) -> list[Page]:
        """The stored tail page that `head` has taken over, when nobody else ends in it."""
        old = session.stored_head
        if (
            old is None
            or old.id is None
            or old is head
            or old.heads
            or old.children
            or old.pins
            or old.parent is None
        ):
            return []
        return [old] if old.raw and old.rows < self.pool.geometry.page_tokens else []

    def forget(self, agent: Agent, done: Done) -> None:
        """Delete the agent, its log, and every page that only it uses. Bytes in RAM are free at once.

        Pages that no session of the namespace leads to go too: they may be what the agent said before it was edited.
        """
        agent.forgotten = True
        del self._agents[agent.row.namespace, agent.row.name]
        for session in agent.sessions.values():
            self._move_head(session, None)
        pages = sorted(self.pool.tree(agent.row.space).pages(), key=lambda p: -p.start)
        gone = [page.id for page in pages if self._discard_if_unused(page) and page.id is not None]
        self._zombies = [p for p in self._zombies if p.pins or p.heads or p.children]
        self.store.forget(agent.row.id, gone, done)

    def _discard_if_unused(self, page: Page) -> bool:
        if page.heads or page.children or page.pins:
            return False
        self.pool.discard(page)
        return True

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
        for session in (s for a in self._agents.values() for s in a.sessions.values()):
            if session.head in lost:
                keep = [p for p in session.head.chain() if p not in lost]
                self._move_head(session, keep[-1] if keep else None)
                session.stored_head = session.head
                heads[session.row.id] = session.head.id if session.head is not None else None
        gone = [p.id for p in lost if p.id is not None]
        self._condemn(list(lost))
        self.store.quarantine(bad, gone, bare, heads)

    def next_extent(self) -> ExtentRow:
        return ExtentRow(self.next_id("extents"), "", 0)

    def next_page(self) -> int:
        return self.next_id("pages")


def _log_bytes(turn: TurnRow) -> int:
    return turn.ids.nbytes + len(str(turn.spans)) + len(str(turn.messages)) + len(str(turn.stats))


class _Rows:
    """Which rows of new pages one commit writes, and where they will lie.

    Rows that another page's pieces hold are not written again.
    """

    def __init__(self, memory: Memory, pages: list[Page]) -> None:
        self._memory, self._pages = memory, pages
        geometry = memory.pool.geometry
        self.pieces: list[tuple[Piece, ...]] = []
        self._packed: list[int] = []
        self._raw: list[int] = []
        self._packed_tokens: list[int] = []
        self._raw_tokens: list[int] = []
        extent = memory.next_extent() if pages else None
        for page in pages:
            if page.id is None:
                page.id = memory.next_page()
            base = self._base(page)
            covered = sum(p.rows for p in base)
            rows, tokens = (self._raw, self._raw_tokens) if page.raw else (self._packed, self._packed_tokens)
            new = tuple(self._arena_rows(page, covered, geometry.page_tokens, geometry.raw_per_slot))
            if new:
                assert extent is not None
                base = (*base, Piece(extent.id, page.raw, len(rows), covered, len(new)))
            rows.extend(new)
            tokens.extend(int(t) for t in page.tokens[covered:])
            self.pieces.append(base)
        self.extent = extent if self._packed or self._raw else None

    @staticmethod
    def _base(page: Page) -> tuple[Piece, ...]:
        if page.origin is None or page.origin[0].pieces is None:
            return ()
        return clip(page.origin[0].pieces, page.origin[1])

    @staticmethod
    def _arena_rows(page: Page, first: int, page_tokens: int, per: int) -> Iterator[int]:
        assert page.slots is not None, "a page without rows on disk left RAM"
        for row in range(first, page.rows):
            yield page.slots[row // per] * per + row % per if page.raw else page.slots[0] * page_tokens + row

    def data(self, namespace: str) -> Callable[[], ExtentData] | None:
        """What the writer thread writes; None when every row is on disk already."""
        if self.extent is None:
            return None
        pool, names = self._memory.pool, self._memory.store.names
        collect = pool.arena.collect(np.array(self._packed, np.int64), np.array(self._raw, np.int64))
        tokens = np.array(self._packed_tokens + self._raw_tokens, np.int32)
        own = self.extent.id
        records = [
            page_record(p, pieces, own, names) for p, pieces in zip(self._pages, self.pieces, strict=True)
        ]

        def data() -> ExtentData:
            packed, raw = collect()
            return ExtentData(pool.fingerprint, namespace, tokens, packed, raw, records)

        return data


def page_record(page: Page, pieces: tuple[Piece, ...], own: int, names: dict[int, str]) -> dict[str, Any]:
    """From these records the index of pages can be rebuilt; `null` as extent means the extent that holds the record."""
    assert page.parent is not None
    return {
        "key": page.key.hex(),
        "parent": page.parent.key.hex(),
        "raw": page.raw,
        "rows": page.rows,
        "pieces": [[None if p.extent == own else names[p.extent], *p[1:]] for p in pieces],
    }
