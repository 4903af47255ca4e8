"""A request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from agentmem.blockpool.page import Match, Page
from agentmem.engine.conversation import Alignment, Span
from agentmem.engine.memory import Agent, Session
from agentmem.engine.reply import Reply
from agentmem.engine.request import ChatRequest, Event, MemoryUsage, State, Ticket
from agentmem.engine.sampler import Sampler
from agentmem.engine.table import Table

Phase = Literal["waiting", "restoring", "prefill", "decode", "closing", "done"]
Finish = Literal["stop", "length", "cancelled"]

LAST_CHUNK = 32


@dataclass(eq=False, slots=True)
class Sequence:
    """One request: its prompt over the session's state, its reply, and the figures that are reported for it.

    `generate=False` only prefills (`append`). `fed` tokens of the prompt are in the table.
    """

    request: ChatRequest
    ticket: Ticket
    sink: Callable[[Event], None]
    generate: bool = True
    phase: Phase = "waiting"
    agent: Agent | None = None
    session: Session | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    alignment: Alignment | None = None
    ids: list[int] = field(default_factory=list)
    max_tokens: int = 0
    match: Match | None = None
    table: Table | None = None
    reply: Reply | None = None
    sampler: Sampler | None = None
    last: int | None = None
    end: int | None = None
    finish: Finish = "stop"
    reused: int = 0
    restored: int = 0
    state_before: State = "cold"
    lost: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    planned: float = 0.0
    restore_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    pinned: list[Page] = field(default_factory=list)

    def next_chunk(self, chunk_tokens: int) -> list[int]:
        """The tokens to feed next. Prompt chunks end at multiples of `chunk_tokens`, so that they do not depend on how much
        was remembered; the last one is short, because logits are made for all of it."""
        assert self.table is not None
        if self.phase != "prefill":
            assert self.last is not None
            return [self.last]
        fed = len(self.table)
        rest = self.ids[fed : fed + chunk_tokens - fed % chunk_tokens]
        if fed + len(rest) == len(self.ids) and len(rest) > 2 * LAST_CHUNK:
            rest = rest[:-LAST_CHUNK]
        return rest

    @property
    def prompt_done(self) -> bool:
        assert self.table is not None
        return len(self.table) >= len(self.ids)

    def spans(self, specials: dict[int, str]) -> list[Span]:
        """What the reply adds to the session."""
        if self.reply is None:
            return []
        spans = []
        if self.reply.kept():
            spans.append(Span("reply", self.reply.kept_text(), self.reply.tokens[: self.reply.kept()]))
        if self.end is not None:
            spans.append(Span("end", specials.get(self.end, ""), [self.end]))
        return spans

    def usage(self, written: int, committed: bool) -> dict[str, Any]:
        """OpenAI's usage object with the `agentmem` extension."""
        completion = (len(self.reply.tokens) if self.reply else 0) + int(self.end is not None)
        memory = MemoryUsage(
            agent=self.request.agent,
            session=self.request.session,
            state_before=self.state_before,
            exact_tokens=self.reused,
            composed_tokens=0,
            evicted_tokens=0,
            prefilled_tokens=len(self.ids) - self.reused,
            restored_tokens=self.restored,
            restore_ms=round(self.restore_ms, 3),
            prefill_ms=round(self.prefill_ms, 3),
            ttft_ms=round(self.ttft_ms, 3),
            bytes_written=written,
            committed=committed,
        )
        return {
            "prompt_tokens": len(self.ids),
            "completion_tokens": completion,
            "total_tokens": len(self.ids) + completion,
            "prompt_tokens_details": {"cached_tokens": self.reused},
            "agentmem": dict(memory),
        }
