"""Agents and their sessions, as the engine holds them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from agentmem.blockpool.index import AgentRow, SessionRow, TurnRow
from agentmem.blockpool.page import Page
from agentmem.blockpool.vault import vault_of
from agentmem.compose.reuse import DEFAULT, Planner, Reuse
from agentmem.engine.conversation import Conversation
from agentmem.episode.policy import Episodic, Full, Window, memory_policy
from agentmem.errors import AgentLocked

HIDDEN = "#"
"""In names of sessions that are parts of others; see `check_name`."""


@dataclass(eq=False, slots=True)
class Session:
    """One growing context. `head` is the last page of its state, `stored_head` the one that the index knows.

    `unlogged` are turns whose commit failed; they are written with the next one. `damaged`: state of it was put aside since its
    last turn.
    """

    row: SessionRow
    conversation: Conversation
    head: Page | None = None
    stored_head: Page | None = None
    unlogged: list[TurnRow] = field(default_factory=list)
    busy: bool = False
    damaged: bool = False
    log_bytes: int = 0

    @property
    def hidden(self) -> bool:
        """Whether it holds something of another session, such as a view of an episode; no client can name one."""
        return HIDDEN in self.row.name

    def replay(self) -> None:
        """Build the conversation from the log. Precondition: it is empty."""
        for turn in self.row.turns:
            self.conversation.apply(turn, tokens=self.row.text)
            self.log_bytes += log_bytes(turn)

    def move_head(self, head: Page | None) -> None:
        """The session's state ends with `head` now. A page in which a session ends stays in the tree."""
        if self.head is not None:
            self.head.heads -= 1
        self.head = head
        if head is not None:
            head.heads += 1

    def shorten(self) -> None:
        """The state ends before the first page whose rows are nowhere any more."""
        for page in self.head.chain() if self.head is not None else []:
            if not page.stored:
                above = page.parent
                self.move_head(above if above is not None and above.parent is not None else None)
                return


@dataclass(eq=False, slots=True)
class Agent:
    """A named owner of sessions. One that was `made` on purpose stays without a turn. A `locked` one is encrypted, and its
    key is not there."""

    row: AgentRow
    sessions: dict[str, Session] = field(default_factory=dict)
    forgotten: bool = False
    made: bool = False
    locked: bool = False

    @property
    def persist(self) -> bool:
        """Whether its turns go to disk."""
        return bool(self.row.policy.get("persist", True))

    @property
    def pinned(self) -> bool:
        """Whether its state stays where it is when room is needed."""
        return bool(self.row.policy.get("pinned", False))

    @property
    def keep_until(self) -> float:
        """Until when its state stays where it is though it is not pinned, in epoch seconds."""
        return float(self.row.policy.get("keep_until", 0.0))

    @property
    def held(self) -> bool:
        """Whether its state stays where it is now: pinned, or asked to be kept for a time that is not over."""
        return self.pinned or self.keep_until > time.time()

    @property
    def reuse(self) -> Reuse:
        """What of remembered state its prompts may use, where a request does not say."""
        return self.row.policy.get("reuse", "exact")

    @property
    def planner(self) -> Planner:
        """How its prompts are composed, if they are, where a request does not say."""
        return self.row.policy.get("planner", DEFAULT)

    @property
    def memory(self) -> Full | Episodic | Window:
        """How much of its past it keeps at hand."""
        return memory_policy(self.row.policy)

    @property
    def spoken(self) -> dict[str, Session]:
        """Its sessions without the hidden ones."""
        return {name: s for name, s in self.sessions.items() if not s.hidden}

    @property
    def encrypted(self) -> str:
        """Where the key of what it leaves on disk is: "file" or "keyring", or "off"."""
        vault = vault_of(self.row.space)
        return "off" if vault is None else "keyring" if vault.startswith("k") else "file"

    def pages(self) -> list[Page]:
        """The pages of all its sessions, each once."""
        chains = (s.head.chain() for s in self.sessions.values() if s.head is not None)
        return list(dict.fromkeys(p for chain in chains for p in chain))


def encryption(agents: Sequence[Agent]) -> dict[str, int]:
    """How many agents are kept how, and how many of them are locked."""
    kinds = Counter(a.encrypted for a in agents)
    return {kind: kinds[kind] for kind in ("off", "file", "keyring")} | {
        "locked": sum(a.locked for a in agents)
    }


def locked(agent: str) -> AgentLocked:
    """What a request for an agent without its key is answered with."""
    return AgentLocked(
        f"agent {agent!r} is encrypted and its key is not there; put the key back (see the daemon's log), or forget the agent",
        param="agent",
    )


def log_bytes(turn: TurnRow) -> int:
    """About what a turn's entry in the token log takes."""
    return turn.ids.nbytes + len(str(turn.spans)) + len(str(turn.messages)) + len(str(turn.stats))
