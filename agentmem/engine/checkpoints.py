"""Checkpoints: where a sequence can go on from, in models whose layers do not all keep every token.

One is taken at the end of every turn, and at chosen places of long prompts. It is a chain of pages that stands for the tokens
up to a page of the tree. That of a turn outlives the daemon as the state of a hidden session, `SESSION#checkpoint`; the others
stay in RAM as long as there is room.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from agentmem.blockpool.geometry import WORD
from agentmem.blockpool.page import Match, Page, match_chain, numbered
from agentmem.blockpool.pool import Pool
from agentmem.engine.agents import HIDDEN, Agent, Session
from agentmem.engine.carry import Baggage, Carry, State, arrays_of, packed, unpacked
from agentmem.engine.journal import Done
from agentmem.engine.memory import Memory
from agentmem.errors import Overloaded

log = logging.getLogger(__name__)

SUFFIX = f"{HIDDEN}checkpoint"
LEAST = 256
"""Tokens that a checkpoint inside a prompt must be ahead of what is remembered: it takes room and a pass of its own."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`pages` hold the states behind the first `tokens` tokens of a sequence."""

    tokens: int
    pages: tuple[Page, ...]

    @property
    def stored(self) -> bool:
        return all(page.stored for page in self.pages)


def stops(page_tokens: int, reused: int, remembered: int, prompt: int) -> tuple[int, ...]:
    """Where checkpoints are taken while a prompt is read: where it leaves what is remembered, so that the next one that does
    starts there, and before its end, so that the same prompt with another end does. All figures are tokens."""
    places = {n // page_tokens * page_tokens for n in (remembered, prompt - 1)}
    return tuple(sorted(n for n in places if reused + LEAST <= n < prompt))


class Checkpoints:
    """Engine thread only."""

    def __init__(self, memory: Memory, pool: Pool, baggage: Baggage) -> None:
        self._memory, self._pool, self.baggage = memory, pool, baggage
        self._known: defaultdict[bytes, list[Checkpoint]] = defaultdict(list)
        self._number = 0
        for agent in memory.agents():
            for name, session in agent.sessions.items():
                if name.endswith(SUFFIX):
                    self._find_again(session)

    def _find_again(self, hidden: Session) -> None:
        """A checkpoint that was kept before the daemon started."""
        facts = hidden.row.turns[-1].stats.get("checkpoint") if hidden.row.turns else None
        pages = hidden.head.chain() if hidden.head is not None else []
        if facts and pages and sum(p.rows for p in pages) == facts["rows"]:
            self._known[bytes.fromhex(facts["base"])].append(Checkpoint(facts["tokens"], tuple(pages)))

    def at(self, page: Page) -> Checkpoint | None:
        """The checkpoint behind `page`, if its rows are somewhere."""
        found = [c for c in self._known.get(page.key, ()) if c.stored]
        if not found:
            self._known.pop(page.key, None)
            return None
        self._known[page.key] = found
        return max(found, key=lambda c: all(p.slots is not None for p in c.pages))

    def match(
        self, agent: Agent, session: Session, ids: Sequence[int], most: int
    ) -> tuple[Match, Checkpoint | None, int]:
        """(the pages that `ids` can go on from with their checkpoint, that checkpoint, how many tokens are remembered at all).

        At most `most` tokens.
        """
        wanted = np.fromiter(ids, np.int32, len(ids))
        matches = [self._pool.tree(agent.row.space).match(wanted)]
        if session.head is not None:
            matches.insert(0, match_chain(session.head, wanted))
        best: tuple[Match, Checkpoint | None] = Match([], 0, 0), None
        for found in matches:
            for i, page in reversed(list(enumerate(found.pages))):
                whole = page is not found.pages[-1] or found.rows == page.rows
                if page.end <= best[0].tokens or page.end > most or not whole:
                    continue
                checkpoint = self.at(page)
                if checkpoint is not None:
                    pages = [*found.pages[: i + 1], *checkpoint.pages]
                    best = Match(pages, page.rows, page.end), checkpoint
                    break
        return *best, max(m.tokens for m in matches)

    def load(self, checkpoint: Checkpoint, carry: Carry) -> None:
        """Go on from a checkpoint, whose pages are in RAM."""
        g, arena = self._pool.geometry, self._pool.arena
        size = self.baggage.words(checkpoint.tokens)
        slots = mx.array([page.slots[0] for page in checkpoint.pages if page.slots is not None])
        rows = -(-WORD * size // g.packed_row_bytes)
        layers = [arena.packed(layer, slots)[:rows] for layer in range(g.layers)]
        words = mx.concatenate(layers, axis=1).reshape(-1)[:size]
        states = unpacked(self.baggage, words, checkpoint.tokens)
        mx.eval(arrays_of(states))
        carry.tokens, carry.states = checkpoint.tokens, states

    def keep(self, agent: Agent, session: Session, head: Page, carry: Carry, done: Done) -> None:
        """A turn ended: keep the states at its end in place of those of the turn before, and those that were marked on the way.

        Where there are no slots for them the next turn reads its prompt from further back. `done` as in `Memory.finish`.
        """
        for page in head.chain():
            if page.end in carry.marks and self.at(page) is None:
                self._mark(agent, page, carry.marks[page.end])
        if head.end != carry.tokens:
            done(0, None)
            return
        hidden = self._memory.hidden(agent, f"{session.row.name}{SUFFIX}")
        before = hidden.head.chain() if hidden.head is not None else []
        same = self.at(head)
        if same is not None and list(same.pages) == before:
            done(0, None)
            return
        try:
            made = Checkpoint(carry.tokens, tuple(self._placed(agent, carry.states)))
        except Overloaded as error:
            log.warning("no room for the checkpoint of agent %s: %s", agent.row.name, error)
            done(0, None)
            return
        self._known[head.key].append(made)

        def noted(written: int, error: Exception | None) -> None:
            self._drop(agent, before)
            done(written, error)

        self._note(agent, hidden, head, made, noted)

    def _note(self, agent: Agent, hidden: Session, base: Page, made: Checkpoint, done: Done) -> None:
        rows = sum(page.rows for page in made.pages)
        facts = {"tokens": made.tokens, "base": base.key.hex(), "rows": rows}
        self._memory.note(
            agent, hidden, {"checkpoint": facts, "chain": [int(made.pages[0].said[0]), rows]}, made.pages[-1],
            done,
        )  # fmt: skip

    def fork(self, agent: Agent) -> None:
        """`agent` was forked from another, and goes on from the same checkpoints."""
        for own in list(agent.spoken.values()):
            found = self.at(own.head) if own.head is not None else None
            if found is not None and own.head is not None:
                self._note(
                    agent,
                    self._memory.hidden(agent, f"{own.row.name}{SUFFIX}"),
                    own.head,
                    found,
                    lambda *_: None,
                )

    def _mark(self, agent: Agent, page: Page, states: tuple[State, ...]) -> None:
        """Keep states in RAM, if there are free slots."""
        size = sum(array.nbytes for array in arrays_of(states))
        if self._pool.geometry.checkpoint_slots(size // WORD) >= self._pool.slots.free:
            return
        pages = self._placed(agent, states)
        for one in pages:
            one.volatile = True
        self._known[page.key].append(Checkpoint(page.end, tuple(pages)))

    def _placed(self, agent: Agent, states: tuple[State, ...]) -> list[Page]:
        """A chain of pages with these states. Raises Overloaded, and leaves no page, when there are no slots."""
        g = self._pool.geometry
        words = packed(states)
        rows = -(-WORD * words.size // g.packed_row_bytes)
        whole = mx.pad(words, (0, rows * g.packed_row_bytes // WORD - words.size)).reshape(rows, -1)
        ends = np.cumsum([0, *g.packed_words]).tolist()
        layers = [whole[:, a:b] for a, b in pairwise(ends)]
        mx.eval(layers)
        slots = self._pool.take(-(-rows // g.page_tokens))
        self._pool.arena.write_packed(slots, layers)
        tree = self._pool.tree(agent.row.space)
        page, pages, ids = tree.root, list[Page](), numbered(self._next_number(), rows)
        for i, slot in enumerate(slots):
            page = tree.add(page, ids[i * g.page_tokens : (i + 1) * g.page_tokens], raw=False)
            self._pool.settle(page, (slot,))
            pages.append(page)
        return pages

    def _next_number(self) -> int:
        """Tells the first page of a chain from those of all others."""
        taken = {int(p.said[0]) for t in self._pool.trees() for p in t.root.children if p.veiled}
        self._number = self._number + 1 & 0x3FFFFFFF
        while self._number in taken:
            self._number = self._number + 1 & 0x3FFFFFFF
        return self._number

    def _drop(self, agent: Agent, pages: list[Page]) -> None:
        """A checkpoint is behind the times: it leaves disk and RAM, unless another session goes on from it."""
        if not pages or pages[-1].heads:
            return
        if agent.persist and not agent.forgotten:
            self._memory.drop(pages, lambda *_: None)
        self._evict(pages)

    def _evict(self, pages: Iterable[Page]) -> None:
        for page in pages:
            if page.slots is not None and not page.pins:
                self._pool.evict(page)
        self._memory.journal.bury()
