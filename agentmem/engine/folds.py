"""Views of episodes, made when nobody waits: which session is due, and one view at a time in small pieces."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from agentmem.blockpool.failpoint import failpoint
from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.engine.agents import Agent, Session
from agentmem.engine.encoders import Encoders
from agentmem.engine.folding import Folding
from agentmem.engine.lives import WHOLE, Lived, Lives
from agentmem.engine.memory import Memory
from agentmem.engine.recall import Recall
from agentmem.episode.patched import Chat
from agentmem.episode.policy import Episodic, Full, Window
from agentmem.errors import Overloaded
from agentmem.model.network import Network

log = logging.getLogger(__name__)

SINKS = 4
"""First tokens that are in every view: attention falls back on them (StreamingLLM)."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request waits for a view of `pages`."""

    agent: Agent
    topic: int
    pages: list[Page]


@dataclass(eq=False, slots=True)
class _Job:
    """A view in the making, of the episode `topic`, up to the page `base`; `pinned` pages are in use, of which it has `brought`
    some into RAM."""

    lived: Lived
    topic: int
    base: Page
    folding: Folding
    pinned: list[Page] = field(default_factory=list)
    brought: list[Page] = field(default_factory=list)
    reading: bool = False
    failed: bool = False


class Folds:
    """Engine thread only. `made` counts views, `most_rows` those in RAM while one was made, at most. Sessions that could not be
    folded are `broken`: they are kept whole then.

    While a view is made the others of its session are not in RAM. The one that turns see comes back before anybody asks.
    """

    def __init__(
        self, memory: Memory, pool: Pool, recall: Recall, network: Network, tokenizer: Chat, encoders: Encoders
    ) -> None:  # fmt: skip
        self.lives = Lives(memory)
        self._memory, self._pool, self._recall = memory, pool, recall
        self._network, self._tokenizer, self._encoders = network, tokenizer, encoders
        self._due: dict[Session, Agent] = {}
        self._urgent: dict[Session, _Wanted] = {}
        self._job: _Job | None = None
        self._aside: set[Session] = set()
        self._returning = 0
        self.most_rows = 0
        self.broken: set[Session] = set()
        self.made = 0

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for a view."""
        return bool(self._urgent)

    @property
    def pending(self) -> bool:
        """Whether anything is to be done."""
        return bool(self._urgent or self._due or self._job or self._returning)

    def due(self, agent: Agent, session: Session) -> None:
        """A turn is over: look, when there is time, whether its session is to be folded."""
        if not isinstance(agent.memory, Full) and session not in self.broken:
            self._due[session] = agent
            self.lives.touched(session)

    def want(self, agent: Agent, session: Session, topic: int, pages: list[Page]) -> None:
        """A request of the session waits for this episode's view of these pages."""
        self._urgent[session] = _Wanted(agent, topic, pages)

    def served(self, session: Session) -> None:
        """No request of the session waits any more."""
        self._urgent.pop(session, None)

    def forget(self, agent: Agent) -> None:
        """The agent goes, or its policy is another."""
        self.lives.drop(agent)
        for session in agent.sessions.values():
            self._aside.discard(session)
            self._due.pop(session, None)
            self._urgent.pop(session, None)
        if self._job is not None and self._job.lived.agent is agent:
            self._job.failed = True
            if not self._job.reading:
                self._end_job()

    def reads(self, agent: Agent) -> bool:
        """Whether pages of the agent are being read for a view, or come back behind one: they cannot go now."""
        return self._returning > 0 or (
            self._job is not None and self._job.reading and self._job.lived.agent is agent
        )

    def older(self, pages: list[Page], usable: int) -> list[Page]:
        """Those of a chain's pages that a view may stand for: within the first `usable` tokens, full, and never the last one."""
        packs = self._pool.geometry.format.packs
        return [p for p in pages[:-1] if p.end <= usable and not (packs and p.raw and p.start > 0)]

    def short(self, agent: Agent, session: Session) -> bool:
        """Whether a session is kept whole, and nobody waits for a view of it."""
        policy = agent.memory
        if session in self._urgent:
            return False
        return (
            not isinstance(policy, Episodic)
            or session.head is None
            or session.head.end <= policy.budget_tokens + policy.block_tokens // 2
        )

    def rest(self) -> bool:
        """There is time: do a piece of what is to be done; returns whether there was any."""
        if not self.pending:
            return False
        try:
            if self._job is not None:
                slots = self._pool.slots.count - self._pool.slots.free
                rows = slots * self._pool.geometry.page_tokens + self._job.folding.rows
                self.most_rows = max(self.most_rows, rows)
                return self._go_on(self._job)
            return self._grow() or self._begin()
        except Exception:
            log.exception("an agent's memory could not be folded; it is kept whole until the next start")
            self.broken |= {self._job.lived.session} if self._job is not None else {*self._urgent, *self._due}
            self._end_job()
            self._urgent.clear()
            self._due.clear()
            return False

    def _grow(self) -> bool:
        """Take a few messages of a session into its topics."""
        for session in [s for s, a in self._due.items() if isinstance(a.memory, Window)]:
            self._leave_window(self._due.pop(session), session)
        long = [(s, a) for s, a in self._due.items() if not self.short(a, s)]
        encoder = self._encoders.get() if long or self._urgent else None
        self._due = dict(long)
        if encoder is None:
            return False
        for session, agent in [*((s, w.agent) for s, w in self._urgent.items()), *self._due.items()]:
            if agent.forgotten:
                self._due.pop(session, None)
                continue
            lived = self.lives.of(agent, session, encoder)
            if not lived.grown:
                lived.grow()
                if lived.grown:
                    self.lives.note(lived)
                    failpoint("topics.grown")
                return True
        return False

    def _begin(self) -> bool:
        """Begin with the view that is needed most."""
        encoder = self._encoders.get() if self._due or self._urgent else None
        if encoder is None or self._memory.unwritten:  # what is not on disk cannot leave RAM
            return False
        for session, wanted in self._urgent.items():
            lived = self.lives.of(wanted.agent, session, encoder)
            if self._start(lived, wanted.topic, wanted.pages, urgent=True):
                return True
        for session, agent in list(self._due.items()):
            if session.busy or session.head is None:
                continue
            lived = self.lives.of(agent, session, encoder)
            pages = self.older(session.head.chain(), session.head.end)
            if any(self._start(lived, topic, pages) for topic in lived.topics()):
                return True
            self._due.pop(session, None)
            self._settle(lived)
        return False

    def _start(self, lived: Lived, topic: int, pages: list[Page], urgent: bool = False) -> bool:
        """Begin to make the view of an episode, if the one that there is does not do; an `urgent` one of what there is."""
        policy = lived.agent.memory
        if not isinstance(policy, Episodic) or not pages:
            return False
        p = self._pool.geometry.page_tokens
        keep = (policy.budget_tokens - SINKS) // p * p
        views = self.lives.views(lived.agent, lived.session)
        view = views.get(topic)
        ends = {page.key.hex(): i for i, page in enumerate(pages)}
        stale = topic != WHOLE and not urgent and lived.life.stale(topic)
        if view is not None and (view.base not in ends or view.rows != keep or stale):
            view = None
        newer = pages if view is None else pages[ends[view.base] + 1 :]
        patience = 1 if urgent else policy.block_tokens // (2 if topic == lived.active else 1)
        if sum(page.rows for page in newer) < (keep + SINKS if view is None else patience):
            return False
        folding = Folding(
            self._pool, self._network, pages[0], SINKS, view.pages if view is not None else (), newer,
            lived.prompt(topic, self._tokenizer), keep=keep, block=policy.block_tokens,
        )  # fmt: skip
        self._job = _Job(lived, topic, newer[-1], folding)
        self._set_aside(lived, [p for v in views.values() if v is not view for p in v.pages])
        failpoint("view.begun")
        return True

    def only(self, lived: Lived) -> None:
        """Turns see the active episode: the views of the others leave RAM."""
        views = self.lives.views(lived.agent, lived.session)
        others = [p for t, v in views.items() if t != lived.active for p in v.pages if p.slots is not None]
        if others:
            self._memory.leave_ram(lived.agent, others)

    def _set_aside(self, lived: Lived, pages: list[Page]) -> None:
        """Views leave RAM while another one is made; what turns see comes back if it was there."""
        head = lived.session.head
        if head is not None and head.slots is not None:
            self._aside.add(lived.session)
        self._memory.leave_ram(lived.agent, pages)

    def _bring_back(self, lived: Lived) -> None:
        """What the session's turns see, where some of it was set aside."""
        shown = self.lives.views(lived.agent, lived.session).get(lived.topics()[0])
        head = lived.session.head
        if lived.session not in self._aside or lived.agent.forgotten or shown is None or head is None:
            return
        self._aside.discard(lived.session)
        seen = [*shown.pages, *(p for p in head.chain() if p.start >= shown.tokens)]
        pages = [p for p in seen if p.slots is None and p.pieces is not None]
        if not pages:
            return

        def done(bad: dict[int, str], _: float) -> None:
            self._returning -= 1
            self._pool.unpin(pages)
            if bad:
                self._memory.lose(bad)

        self._pool.pin(pages)
        try:
            self._recall.start(pages, done)
        except Overloaded:
            self._pool.unpin(pages)
            return
        self._returning += 1

    def _go_on(self, job: _Job) -> bool:
        if job.failed or job.lived.agent.forgotten:
            self._end_job()
            return True
        if job.reading:
            return False
        wanted = job.folding.wanted()
        if job.pinned != wanted:
            self._let_go(job)
            self._memory.leave_ram(job.lived.agent, [p for p in job.folding.taken if p.start or p.veiled])
            job.pinned = wanted
            self._pool.pin(wanted)
        missing = [p for p in wanted if p.slots is None]
        if missing:
            return self._read(job, missing)
        if job.folding.step():
            failpoint("view.scored")
            self._keep(job)
        return True

    def _read(self, job: _Job, missing: list[Page]) -> bool:
        """Bring pages from disk that a view is chosen from."""
        if any(p.pieces is None for p in missing):
            job.failed = True
            return True

        def done(bad: dict[int, str], _: float) -> None:
            job.reading = False
            if bad:
                job.failed = True
                self._memory.lose(bad)

        try:
            self._recall.start(missing, done)
        except Overloaded:
            return False
        job.reading = True
        job.brought += missing
        return True

    def _let_go(self, job: _Job) -> None:
        """The pages that a job has used may leave RAM, and those do that it has brought."""
        self._pool.unpin(job.pinned)
        self._evict(job.brought)
        job.pinned, job.brought = [], []

    def _keep(self, job: _Job) -> None:
        """The view is chosen: its pages go to disk, and those of the one before it go."""
        lived = job.lived
        if job.topic not in lived.topics():
            self._end_job()
            return
        number = (lived.session.row.id << 16) + self.made & 0x7FFFFFFF
        self._let_go(job)
        older = lived.session.head.chain()[1:] if lived.session.head is not None else []
        self._memory.leave_ram(
            lived.agent, [*job.folding.taken, *(p for p in older if p.end <= job.base.end)]
        )
        try:
            head = job.folding.place(number)
        except Overloaded:
            self._end_job()
            return
        self.made += 1
        failpoint("view.placed")
        before: list[Page] = []

        def done(written: int, error: Exception | None) -> None:
            failpoint("view.kept")
            self.drop(before)
            self._leave_ram(lived)

        before += self.lives.put_view(lived, job.topic, head, job.base, done)
        if job.topic != WHOLE:
            lived.life.built(job.topic)
        self._urgent.pop(lived.session, None)
        self._end_job()

    def _end_job(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            self._let_go(job)

    def _settle(self, lived: Lived) -> None:
        """Nothing is left to be made: let go of views of episodes that are no more, and write what has changed."""
        topics = set(lived.topics())
        self.drop(self.lives.take_views(lived.agent, lived.session, lambda t: t not in topics))
        self.lives.note(lived)
        self._leave_ram(lived)
        self._bring_back(lived)

    def drop(self, pages: list[Page]) -> None:
        """Pages of views that are no more leave disk and RAM."""
        if not pages:
            return
        self._memory.drop(pages, lambda *_: failpoint("view.dropped"))
        self._evict(pages)

    def _leave_ram(self, lived: Lived) -> None:
        """What no turn of the session shows leaves RAM: older rows, and views of other episodes."""
        agent, session = lived.agent, lived.session
        if agent.forgotten:
            return
        views = self.lives.views(agent, session)
        shown = views.get(lived.topics()[0])
        if shown is None or session.head is None:
            return
        older = [p for p in session.head.chain()[1:] if p.end <= shown.tokens]
        rest = [p for v in views.values() if v is not shown for p in v.pages]
        self._memory.leave_ram(agent, (*older, *rest))

    def _leave_window(self, agent: Agent, session: Session) -> None:
        """What lies behind the window leaves RAM, once it is on disk."""
        policy, head = agent.memory, session.head
        if agent.forgotten or head is None or not isinstance(policy, Window):
            return
        p = self._pool.geometry.page_tokens
        older = [page for page in head.chain()[1:] if page.end <= head.end - policy.recent - p]
        self._memory.leave_ram(agent, older)

    def _evict(self, pages: Iterable[Page]) -> None:
        for page in pages:
            if page.slots is not None and not page.pins:
                self._pool.evict(page)
        self._memory.journal.bury()
