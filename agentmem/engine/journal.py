"""The journal: the way of finished turns to disk, and of pages that nobody needs out of the tree."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agentmem.blockpool.index import ExtentRow, TurnCommit, TurnRow
from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.engine.agents import Agent, Session
from agentmem.engine.commit_rows import CommitRows
from agentmem.engine.compaction import fragments

Done = Callable[[int, Exception | None], None]


class Ids:
    """Ids of new rows, by table."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def start(self, last: dict[str, int]) -> None:
        self._last = last

    def next(self, table: str) -> int:
        self._last[table] += 1
        return self._last[table]

    def extent(self) -> ExtentRow:
        return ExtentRow(self.next("extents"), "", 0)


@dataclass(slots=True)
class _Pending:
    agent: Agent
    session: Session
    turn: TurnRow
    head: Page | None
    done: Done


class Journal:
    """Commits one turn at a time, in the order in which they ended, because a turn's pages refer to rows that the turn before
    it wrote. When no turn waits, it merges the small extents of the session that was written last. Engine thread only.

    `settled` is called after each commit, when nothing is being written.
    """

    def __init__(self, store: Store, pool: Pool, ids: Ids) -> None:
        self.store, self.pool, self.ids = store, pool, ids
        self.settled: Callable[[Agent], None] = lambda agent: None
        self.compactions = 0
        self.compacted_bytes = 0
        self._queue: deque[_Pending] = deque()
        self._writing = False
        self._zombies: list[Page] = []

    @property
    def unwritten(self) -> int:
        """Turns whose commit has not ended, and a compaction that runs."""
        return len(self._queue) + int(self._writing)

    def add(self, agent: Agent, session: Session, turn: TurnRow, head: Page | None, done: Done) -> None:
        """Queue the commit of a turn with state up to `head`; `done(bytes written, error)` runs on the engine thread."""
        for page in head.chain() if head is not None else []:
            page.volatile = False
        self._queue.append(_Pending(agent, session, turn, head, done))
        self.pump()

    def keep_in_ram(self, head: Page | None) -> None:
        """A turn that must not go to disk: its pages may leave RAM unwritten."""
        for page in head.chain() if head is not None else []:
            page.volatile = page.volatile or page.pieces is None
        self.bury()

    def pump(self) -> None:
        """Hand the next queued turn to the writer, when it is idle."""
        self.bury()
        while self._queue and not self._writing:
            pending = self._queue.popleft()
            if pending.agent.forgotten:
                pending.done(0, None)
                continue
            self._write(pending)

    def _write(self, pending: _Pending) -> None:
        """Prepare and submit one commit: the pages of the chain that are not on disk, and the log entry."""
        agent, session = pending.agent, pending.session
        pending.head = self._last_kept(pending)
        chain = pending.head.chain() if pending.head is not None else []
        new = [p for p in chain if p.pieces is None]
        for page in new:
            if page.id is None:
                page.id = self.ids.next("pages")
        own = set(session.stored_head.chain()) if session.stored_head is not None else ()
        rows = CommitRows(self.pool, new, self.ids.extent(), own)
        dropped = self._superseded(session, pending.head)
        commit = TurnCommit(
            agent.row, session.row, pending.turn, pending.head,
            pages=list(zip(new, rows.pieces, strict=True)),
            dropped=[p.id for p in dropped if p.id is not None],
            extent=rows.extent, earlier=list(session.unlogged),
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
                session.stored_head = pending.head
                session.unlogged.clear()
                self.condemn(dropped)
            else:
                session.unlogged.append(pending.turn)
            pending.done(written or 0, error)
            if not self._queue:
                self._tidy(agent, session) if error is None else self.settled(agent)
            self.pump()

        self.store.commit(commit, rows.data(agent.row.space, self.store.names), done)

    def _tidy(self, agent: Agent, session: Session) -> None:
        """Between turns: merge small extents, or, where there is nothing to merge, keep the budgets."""
        chain = session.stored_head.chain() if session.stored_head is not None else []
        pages = fragments(chain, self.pool.geometry)
        if pages:
            self._compact(agent, pages)
        else:
            self.settled(agent)

    def _compact(self, agent: Agent, pages: list[Page]) -> None:
        """Write the rows of `pages` once more, side by side; the extents that become empty go."""
        extent = self.ids.extent()
        rows = CommitRows(self.pool, pages, extent)
        data = rows.data(agent.row.space, self.store.names)
        assert data is not None
        moved = [(p.id, pieces) for p, pieces in zip(pages, rows.pieces, strict=True) if p.id is not None]
        self.pool.pin(pages)
        self._writing = True

        def done(written: int | None, error: Exception | None) -> None:
            self._writing = False
            self.pool.unpin(pages)
            if error is None:
                self.compactions += 1
                self.compacted_bytes += written or 0
                for page, pieces in zip(pages, rows.pieces, strict=True):
                    if page.pieces is not None:
                        page.pieces = pieces
            self.settled(agent)
            self.pump()

        self.store.compact(data, extent, moved, done)

    def _last_kept(self, pending: _Pending) -> Page | None:
        """The turn's head, or the page before the first that left RAM unwritten (possible only after a failed write)."""
        head = pending.head
        for page in head.chain() if head is not None else []:
            if not page.stored:
                head = page.parent if page.parent is not None and page.parent.parent is not None else None
                if pending.session.head is pending.head:
                    pending.session.move_head(head)
                break
        return head

    def condemn(self, pages: list[Page]) -> None:
        """The index has dropped these pages: whoever still uses one writes it again."""
        for page in pages:
            page.pieces, page.id = None, None
        self._zombies.extend(pages)
        self.bury()

    def bury(self) -> None:
        """Discard condemned pages, and those that left RAM unwritten. One that a running sequence reads, or that a turn ends
        in, waits until it is free."""
        condemned = [p for p in (*self._zombies, *self.pool.lost) if p.pieces is None]
        self._zombies = []
        self.pool.lost.clear()
        for page in sorted(dict.fromkeys(condemned), key=lambda p: -p.start):
            if not self.discard_if_unused(page):
                self._zombies.append(page)

    def forget_buried(self) -> None:
        """Leave out of the condemned what was discarded otherwise."""
        self._zombies = [p for p in self._zombies if p.pins or p.heads or p.children]

    def discard_if_unused(self, page: Page) -> bool:
        """Take a page out of RAM and tree, unless somebody uses it; returns whether it went."""
        if page.heads or page.children or page.pins:
            return False
        self.pool.discard(page)
        return True

    def _superseded(self, session: Session, head: Page | None) -> list[Page]:
        """The stored tail page that `head` has taken over, when nobody else ends in it."""
        old = session.stored_head
        if old is None or old.id is None or old is head or old.parent is None:
            return []
        if old.heads or old.children or old.pins or not old.raw:
            return []
        return [old] if old.rows < self.pool.geometry.page_tokens else []


def dropped_heads(sessions: Iterable[Session], gone: set[Page]) -> dict[int, int | None]:
    """{session id: id of the page that its stored state ends with, once `gone` pages are off the disk}; sessions follow."""
    heads: dict[int, int | None] = {}
    for session in sessions:
        if session.stored_head in gone:
            kept = [p for p in session.stored_head.chain() if p not in gone and p.pieces is not None]
            session.stored_head = kept[-1] if kept else None
            heads[session.row.id] = kept[-1].id if kept else None
        session.shorten()
    return heads
