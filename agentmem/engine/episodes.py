"""Episodic memory in the engine: which rows stand for an agent's past, and their choice anew when nobody waits.

An agent is exact while its history is not longer than budget and block together. Beyond, a turn sees sinks, the view of one
episode, and every token since that view was made. What is computed then is approximate: its pages are veiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentmem.blockpool.page import Match, Page, match_chain
from agentmem.blockpool.pool import Pool
from agentmem.engine.agents import Agent, Session
from agentmem.engine.encoders import Encoders
from agentmem.engine.folds import SINKS, Folds
from agentmem.engine.lives import WHOLE, Lived, View
from agentmem.engine.past import NOTHING, Past
from agentmem.engine.sequence import Sequence
from agentmem.engine.shown import Shown
from agentmem.episode.policy import Episodic, Full, Window


class Episodes:
    """Engine thread only. `folds` makes the views."""

    def __init__(self, pool: Pool, folds: Folds, encoders: Encoders) -> None:
        self.pool, self.folds, self.encoders, self.lives = pool, folds, encoders, folds.lives

    def past(self, sequence: Sequence, exact: Callable[[], Match]) -> Past:
        """What the turn starts from; `exact` looks up the longest prefix that any prompt may use."""
        agent, session = sequence.agent, sequence.session
        assert agent is not None
        assert session is not None
        policy = agent.memory
        if isinstance(policy, Full):
            return Past(exact())
        match = (
            match_chain(session.head, sequence.ids, veils=True) if session.head is not None else NOTHING.match
        )
        if sequence.alignment is None or match.tokens + 1 < sequence.alignment.keep or not match.tokens:
            match = max(match, exact(), key=lambda m: m.tokens)
        usable = min(match.tokens, len(sequence.ids) - int(sequence.generate))
        if isinstance(policy, Window):
            return self._windowed(match, usable, policy)
        if match.tokens <= policy.budget_tokens + policy.block_tokens:
            return Past(match)
        if session in self.folds.broken:
            return Past(match, notes=("kept whole: its memory could not be folded; see the daemon's log",))
        return self._episode(sequence, agent, session, match, usable, policy)

    def foreseen(self, sequence: Sequence, agent: Agent, session: Session) -> list[Page]:
        """The pages that a request which waits is likely to start from: its episode's, and the newest."""
        return self.likely(agent, session, sequence.request.messages)

    def likely(
        self, agent: Agent, session: Session, messages: list[dict[str, Any]] | None = None
    ) -> list[Page]:
        """The same for what is going to be said, or for the episode of the last turn."""
        chain = session.head.chain() if session.head is not None else []
        policy = agent.memory
        if isinstance(policy, Window):
            return [p for i, p in enumerate(chain) if not i or p.end > chain[-1].end - policy.recent]
        encoder = self.encoders.get() if isinstance(policy, Episodic) else None
        if encoder is None or self.folds.short(agent, session):
            return chain if self.folds.short(agent, session) else []
        views = self.lives.views(agent, session)
        lived = self.lives.of(agent, session, encoder)
        topic = lived.topics()[0] if messages is None else self._routed(messages, lived)[0]
        view = views.get(topic)
        return (
            [chain[0], *view.pages, *(p for p in chain if p.start >= view.tokens)] if view is not None else []
        )

    def _windowed(self, match: Match, usable: int, policy: Window) -> Past:
        older = [p for p in match.pages if p.end <= min(usable, match.tokens - policy.recent)]
        if len(older) < 2:
            return Past(match)
        shown = Shown(match.pages[0], policy.sinks, (), older[-1].end, older[-1])
        kept = match.pages[len(older) :]
        note = f"window: the first {policy.sinks} tokens and those from {shown.tokens} on; {shown.gap} are left out"
        return Past(match._replace(pages=[*shown.pages, *kept]), shown, notes=(note,))

    def _episode(
        self, sequence: Sequence, agent: Agent, session: Session, match: Match, usable: int, policy: Episodic
    ) -> Past:
        encoder = self.encoders.get()
        if encoder is None:
            return Past(match, ready=False)
        lived = self.lives.of(agent, session, encoder)
        ends = {p.key.hex(): i for i, p in enumerate(match.pages) if p.end <= usable}
        views = {t: v for t, v in self.lives.views(agent, session).items() if v.base in ends}
        long = len(sequence.ids) - match.tokens > policy.block_tokens
        newest = policy.block_tokens if long else 2 * policy.block_tokens
        near = {t: v for t, v in views.items() if match.tokens - v.tokens <= newest}
        if sequence.routed is None or sequence.routed[0] not in lived.topics():
            sequence.routed = self._routed(sequence.messages, lived)
        chosen, why = sequence.routed
        if chosen not in near and near:
            other = lived.active if lived.active in near else max(near, key=lambda t: near[t].tokens)
            why = f"{why}; it is still being made, so episode {other} was used"
            chosen = other
        if chosen not in near:
            pages = self.folds.older(match.pages, usable)
            if pages:
                self.folds.want(agent, session, chosen, pages)
            return Past(match, ready=not pages)
        self.folds.served(session)
        return self._shown(match, views[chosen], ends, chosen, why)

    def _shown(self, match: Match, view: View, ends: dict[str, int], topic: int, why: str) -> Past:
        at = ends[view.base]
        shown = Shown(match.pages[0], SINKS, view.pages, view.tokens, match.pages[at])
        pages = [*shown.pages, *match.pages[at + 1 :]]
        note = f"{why}; {shown.gap} of {match.tokens} tokens are left out, the last {match.tokens - shown.tokens} are all there"
        return Past(match._replace(pages=pages), shown, notes=(note,), episode=topic)

    @staticmethod
    def _routed(messages: list[dict[str, Any]], lived: Lived) -> tuple[int, str]:
        if not lived.life.topics:
            return WHOLE, "one episode: the conversation is too short for several"
        message, before = lived.question(messages)
        routing = lived.life.route(message, before, lived.active)
        return (WHOLE if routing.topic is None else routing.topic), routing.reason

    def began(self, sequence: Sequence, past: Past) -> None:
        """The turn was admitted with this past."""
        if past.episode is not None and sequence.agent is not None and sequence.session is not None:
            encoder = self.encoders.get()
            assert encoder is not None
            lived = self.lives.of(sequence.agent, sequence.session, encoder)
            lived.active = past.episode
            self.folds.only(lived)
            if past.episode != WHOLE:
                lived.life.hit(past.episode)

    def changed(self, agent: Agent) -> None:
        """The agent's policy is another: views of before go, and are made anew where they are wanted."""
        self.folds.forget(agent)
        for session in agent.spoken.values():
            self.folds.drop(self.lives.take_views(agent, session, lambda _: True))
            self.folds.due(agent, session)

    def report(self, agent: Agent, session: Session) -> dict[str, Any]:
        """The episodes of a session."""
        policy = agent.memory
        encoder = self.encoders.get() if isinstance(policy, Episodic) else None
        found: dict[str, Any] = {
            "agent": agent.row.name, "session": session.row.name, "policy": policy.model_dump(),
            "tokens": session.conversation.length, "encoder": encoder.name if encoder is not None else None, "episodes": [],
        }  # fmt: skip
        chain = session.head.chain() if session.head is not None else []
        views = self.lives.views(agent, session)
        pages = {p for v in views.values() for p in v.pages} | set(chain)
        resident = sum(p.rows for p in pages if p.slots is not None)
        found["resident_tokens"] = resident
        found["evicted_tokens"] = 0
        if isinstance(policy, Window) and chain:
            shown_window = self._windowed(
                Match(chain, chain[-1].rows, chain[-1].end), chain[-1].end, policy
            ).shown
            found["evicted_tokens"] = shown_window.gap if shown_window is not None else 0
        if encoder is None:
            return found
        lived = self.lives.of(agent, session, encoder)
        if lived.active in views:
            shown = views[lived.active]
            found["evicted_tokens"] = shown.tokens - shown.rows - SINKS
        found["episodes"] = [self._told(lived, topic, views.get(topic)) for topic in sorted(lived.topics())]
        return found

    def _told(self, lived: Lived, topic: int, view: View | None) -> dict[str, Any]:
        life = lived.life
        size = next((len(t) for t in life.topics if t.id == topic), 0)
        pages = view.pages if view is not None else ()
        in_ram = bool(pages) and all(p.slots is not None for p in pages)
        rows = view.rows if view is not None else 0
        return {
            "id": topic,
            "title": life.titles.get(topic, "") if topic != WHOLE else "",
            "lines": life.lines(topic) if topic != WHOLE else [],
            "segments": size,
            "tokens": rows,
            "bytes": rows * self.pool.geometry.row_bytes(not self.pool.geometry.format.packs),
            "built_through": view.tokens if view is not None else 0,
            "state": "cold" if view is None else "hot" if in_ram else "warm",
            "hits": life.hits.get(topic, 0),
            "active": topic == lived.active,
        }
