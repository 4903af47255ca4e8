"""What the engine knows of episodic sessions: what they are about, and the views of them that were made.

Both outlive the daemon as hidden sessions: `SESSION#topics`, whose log tells how the topics came about, and one `SESSION#view.N`
for each episode, whose state is a chain of veiled pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentmem.blockpool.page import Page
from agentmem.engine.agents import HIDDEN, Agent, Session
from agentmem.engine.journal import Done
from agentmem.engine.memory import Memory
from agentmem.episode.encoder import Encoder
from agentmem.episode.life import Life
from agentmem.episode.patched import Chat, patched_prompt
from agentmem.episode.policy import Episodic
from agentmem.episode.segment import segments_of
from agentmem.episode.utterance import utterances_of

WHOLE = -1
"""The one episode of a conversation that is too short to have topics."""
LATEST = 8
PROMPT = 512
"""Tokens of the prompt by which a view is chosen."""
MESSAGES = 8
"""That are looked at between two looks at who else waits."""


@dataclass(frozen=True, slots=True)
class View:
    """A view: `pages` stand for the first `tokens` tokens of the session, whose page that ends there has the key `base`."""

    pages: tuple[Page, ...]
    tokens: int
    base: str

    @property
    def rows(self) -> int:
        return sum(page.rows for page in self.pages)


@dataclass(eq=False, slots=True)
class Lived:
    """One episodic session. `active` is the episode of its last turn; `seen`: messages that `life` has taken in, which a turn
    since then may have `touched`."""

    agent: Agent
    session: Session
    life: Life
    active: int | None = None
    seen: int = 0
    touched: bool = True

    @property
    def grown(self) -> bool:
        return self.seen == len(self.session.conversation.messages) and not self.touched

    def grow(self) -> None:
        """Take in the next few messages."""
        messages = self.session.conversation.messages
        self.seen = min(self.seen + MESSAGES, len(messages))
        self.life.grow(messages[: self.seen])
        self.touched = False

    def topics(self) -> list[int]:
        """The episodes there are, the active one first if it is still there, then by how often they were asked for."""
        ids = [topic.id for topic in self.life.topics] or [WHOLE]
        return sorted(ids, key=lambda t: (t != self.active, -self.life.hits.get(t, 0), t))

    def prompt(self, topic: int, tokenizer: Chat) -> list[int]:
        """What a view of this episode is chosen by."""
        if topic != WHOLE:
            return self.life.prompt(topic, tokenizer, PROMPT)
        segments = segments_of(utterances_of(self.session.conversation.messages))
        return patched_prompt(tokenizer, segments[-LATEST:], PROMPT)

    def question(self, messages: list[dict[str, Any]]) -> tuple[str, str | None]:
        """The last message of the user, and the one before it."""
        asked = [str(m.get("content") or "") for m in messages if m.get("role") == "user"]
        return (asked[-1] if asked else "", asked[-2] if len(asked) > 1 else None)


class Lives:
    """Engine thread only."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._known: dict[Session, Lived] = {}

    def of(self, agent: Agent, session: Session, encoder: Encoder) -> Lived:
        """What is known of a session, as it was left, or from its beginning."""
        policy = agent.memory
        wanted = policy.episodes if isinstance(policy, Episodic) else None
        known = self._known.get(session)
        if known is None or known.life.encoder_name != encoder.name:
            log = agent.sessions.get(_topics(session))
            records = [t.stats["topics"] for t in log.row.turns if "topics" in t.stats] if log else []
            messages = session.conversation.messages
            life = Life.restored(encoder, messages, records, wanted) if records else Life(encoder, wanted)
            known = self._known[session] = Lived(agent, session, life, seen=len(messages) if records else 0)
        return known

    def touched(self, session: Session) -> None:
        """A turn of the session is over."""
        if session in self._known:
            self._known[session].touched = True

    def drop(self, agent: Agent) -> None:
        for session in agent.sessions.values():
            self._known.pop(session, None)

    def note(self, lived: Lived) -> None:
        """Log what has changed of the topics."""
        record = lived.life.record()
        if record is not None:
            hidden = self._memory.hidden(lived.agent, _topics(lived.session))
            self._memory.note(lived.agent, hidden, {"topics": record}, None, lambda *_: None)

    def views(self, agent: Agent, session: Session) -> dict[int, View]:
        """The views whose rows are all somewhere, by episode."""
        found = {}
        for topic, hidden, head in _made(agent, session):
            facts, pages = hidden.row.turns[-1].stats["view"], tuple(head.chain())
            if all(p.stored for p in pages) and sum(p.rows for p in pages) == facts["rows"]:
                found[topic] = View(pages, facts["tokens"], facts["base"])
        return found

    def put_view(self, lived: Lived, topic: int, head: Page, base: Page, done: Done) -> list[Page]:
        """A view was made of the session's tokens up to `base`; returns the pages of the one before it, if there was one."""
        hidden = self._memory.hidden(lived.agent, f"{_views(lived.session)}{topic}")
        before = hidden.head.chain() if hidden.head is not None else []
        pages = head.chain()
        rows = sum(p.rows for p in pages)
        facts = {"tokens": base.end, "base": base.key.hex(), "rows": rows}
        stats = {"view": facts, "chain": [int(pages[0].said[0]), rows]}
        self._memory.note(lived.agent, hidden, stats, head, done)
        return before

    def take_views(self, agent: Agent, session: Session, gone: Callable[[int], bool]) -> list[Page]:
        """Views of episodes that are `gone` end; returns their pages."""
        pages = []
        for topic, hidden, head in _made(agent, session):
            if gone(topic):
                pages += head.chain()
                hidden.move_head(None)
        return pages


def _made(agent: Agent, session: Session) -> list[tuple[int, Session, Page]]:
    """Episodes that a view was made of, with the hidden session of each and the last page of its state."""
    prefix = _views(session)
    found = ((name.removeprefix(prefix), s) for name, s in agent.sessions.items() if name.startswith(prefix))
    return [(int(topic), s, s.head) for topic, s in found if s.head is not None and s.row.turns]


def _views(session: Session) -> str:
    return f"{session.row.name}{HIDDEN}view."


def _topics(session: Session) -> str:
    return f"{session.row.name}{HIDDEN}topics"
