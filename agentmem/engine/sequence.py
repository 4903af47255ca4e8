"""A request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Match, Page
from agentmem.compose.recognise import Span as ContentSpan
from agentmem.compose.reuse import Reuse
from agentmem.engine.conversation import Alignment, Span
from agentmem.engine.course import Course
from agentmem.engine.memory import Agent, Session
from agentmem.engine.past import NOTHING, Past
from agentmem.engine.reply import Reply
from agentmem.engine.request import (
    ChatRequest,
    Choice,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    MemoryUsage,
    State,
    Ticket,
    TokenLogprob,
)
from agentmem.engine.sampler import Sampler
from agentmem.engine.table import Table

Phase = Literal["waiting", "restoring", "prefill", "decode", "ended", "closing", "done"]
Finish = FinishReason


@dataclass(frozen=True, slots=True)
class Known:
    """Tokens of a prompt that were remembered, some of them compressed; those that its session kept of `held` ones."""

    reused: int
    compressed: int
    kept: int
    held: int


@dataclass(eq=False, slots=True)
class Sequence:
    """One request: its prompt over the session's state, its reply, and the figures that are reported for it.

    `guess` stands for the tokens of a prompt that is not rendered yet; `prefetched` rows were read while it waited.
    `generate=False` only prefills (`append`). `fed` tokens of the prompt are in the table.
    `others` are the further replies of a request that wants several: sequences of their own from the end of the prompt on,
    of which nothing is kept. The `first` one stays in phase `ended` until all of them are done.
    A composed prompt follows a `course` behind its exact `prefix`, which is all of it that becomes pages; `notes` say what of it
    is composed, or why nothing is. `content` has the spans of its messages, where it may be composed. What is remembered of its
    `past` may be `compressed` for so many tokens of what is `reused`; `most` tokens of its prompt have rows then.
    One that is read in stretches has what was known `before` the first; each of these is a `part`.
    It was `routed` to an episode for a reason, once. At its `stops`, tokens of the prompt, checkpoints are taken.
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
    guess: int = 1
    prefetched: int = 0
    state_before: State = "cold"
    lost: bool = False
    announced: bool = False
    reported: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    planned: float = 0.0
    restore_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    pinned: list[Page] = field(default_factory=list)
    reuse: Reuse = "exact"
    content: list[ContentSpan] = field(default_factory=list)
    course: Course | None = None
    prefix: Table | None = None
    composed: int = 0
    notes: tuple[str, ...] = ()
    past: Past = field(default_factory=lambda: NOTHING)
    compressed: int = 0
    most: int | None = None
    before: Known | None = None
    routed: tuple[int, str] | None = None
    part: bool = False
    stops: tuple[int, ...] = ()
    first: Sequence | None = None
    index: int = 0
    others: list[Sequence] = field(default_factory=list)

    @property
    def agent_key(self) -> tuple[str, str]:
        """Whose share of the machine it counts against."""
        return self.request.namespace, self.request.agent

    @property
    def background(self) -> bool:
        """Whether nobody waits for it."""
        return self.request.job is not None

    @property
    def arrived(self) -> float:
        return self.submitted

    @property
    def remaining(self) -> int:
        """Tokens of the prompt that can be fed now; a guess while it waits."""
        if self.table is None:
            return self.guess
        end = self.course.read_until(self.history) if self.course is not None else len(self.ids)
        return min([end, *(n for n in self.stops if n > self.history)]) - self.history

    @property
    def history(self) -> int:
        """Tokens in the table."""
        return len(self.table) if self.table is not None else 0

    def next_chunk(self, tokens: int) -> list[int]:
        """The next `tokens` tokens of the prompt."""
        return self.ids[self.history : self.history + tokens]

    def is_due(self, tokens: int) -> bool:
        """Whether the first token of the reply comes after the next `tokens` of the prompt."""
        return self.generate and self.history + tokens >= len(self.ids)

    @property
    def may_compose(self) -> bool:
        """Whether its prompt may be composed, and what it computes may become segments."""
        return self.reuse in ("composed", "auto")

    def only_read(self) -> bool:
        """Nobody waits for the reply any more: whether the rest of the prompt is still read, and no more than that.

        Who left while it was read mostly comes back, and then it is there. Not so for what is composed, and counts for nothing
        else, read in stretches, or for a job.
        """
        if self.phase != "prefill" or self.course is not None or self.part or self.background:
            return False
        self.generate = False
        return not self.prompt_done

    @property
    def whole(self) -> Sequence:
        """The sequence that stands for the request."""
        return self.first or self

    @property
    def position(self) -> int:
        """Index of the next token in the reply."""
        assert self.reply is not None
        return len(self.reply.tokens)

    def samplers(self, n: int) -> list[Sampler]:
        """The samplers of `n` replies; this one's is the first."""
        assert self.sampler is not None
        return [self.sampler, *(self.sampler.sibling(i) for i in range(1, n))]

    def stretch(self, alignment: Alignment, end: int) -> Sequence:
        """The first `end` tokens of its prompt as a turn of their own, from what is remembered now; it waits for that.

        If that turn fails, so has this one.
        """
        assert self.session is not None

        def failed(event: Event) -> None:
            if isinstance(event, Failed):
                self.phase = "done"
                self.sink(event)

        part = Sequence(
            self.request, self.ticket, failed, generate=False, agent=self.agent, session=self.session,
            messages=self.session.conversation.messages, alignment=alignment, ids=self.ids[:end], match=self.match,
            past=self.past, reused=self.reused, compressed=self.compressed, most=self.most, pinned=self.pinned,
            state_before=self.state_before, planned=self.planned, announced=True, prefetched=self.prefetched, part=True,
        )  # fmt: skip
        if self.before is None:
            assert self.alignment is not None
            held = len(self.session.conversation.ids)
            self.before = Known(self.reused, self.compressed, self.alignment.keep, held)
        self.session, self.match, self.pinned, self.prefetched = None, None, [], 0
        return part

    def fork(self, reply: Reply) -> Sequence:
        """One more reply to the same prompt, which the table holds and the model has just run."""
        assert self.table is not None
        assert self.sampler is not None
        index = len(self.others) + 1
        other = Sequence(
            self.request, self.ticket, self.sink, phase="decode", ids=self.ids, max_tokens=self.max_tokens,
            table=self.table.fork(), reply=reply, sampler=self.sampler.sibling(index), first=self, index=index,
        )  # fmt: skip
        self.others.append(other)
        return other

    def take(self, token: int, logprob: TokenLogprob | None, ends: Collection[int]) -> Finish | None:
        """Add a token to the reply and show what it says; returns why the reply is over, or None."""
        assert self.reply is not None
        assert self.sampler is not None
        self.last = token
        if token in ends:
            self.end = token
            return "stop"
        self.sampler.saw(token)
        self._show(self.reply.add(token, logprob))
        if self.reply.stopped:
            return "stop"
        return "length" if len(self.reply.tokens) >= self.max_tokens else None

    def show_rest(self) -> None:
        """The reply is over: show what was held back."""
        if self.reply is not None:
            self._show(self.reply.finish())

    def _show(self, text: str) -> None:
        assert self.reply is not None
        logprobs = self.reply.release() if self.request.top_logprobs is not None else None
        if text or logprobs:
            self.sink(Delta(text, self.index, logprobs))

    @property
    def exact(self) -> int:
        """Tokens that are reused as if the conversation had never been interrupted."""
        known = self.before or self
        return known.reused - known.compressed

    @property
    def width(self) -> int:
        """How many sequences the request makes of a batch."""
        return self.request.n if self.first is None else 0

    @property
    def totals(self) -> list[int]:
        """Tokens of each sequence of the request at its end."""
        return [self._held + self.max_tokens] * self.width

    @property
    def _held(self) -> int:
        """Tokens of the prompt that have rows, at most."""
        return len(self.ids) if self.most is None else min(self.most, len(self.ids))

    @property
    def composing(self) -> int:
        """Tokens of it whose state may be held outside of its table."""
        return len(self.ids) + self.max_tokens if self.may_compose and self.first is None else 0

    def worst_slots(self, geometry: Geometry) -> int:
        """Slots that the request can take at most. Its further replies share the prompt."""
        if self.first is not None:
            return 0
        others = (self.request.n - 1) * geometry.worst_slots(geometry.page_tokens + self.max_tokens + 1)
        return geometry.worst_slots(self._held + self.max_tokens + 1) + others

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

    @property
    def choice(self) -> Choice:
        """The reply as it is reported."""
        logprobs = self.reply.released() if self.reply and self.request.top_logprobs is not None else None
        if self.reply is None:
            return Choice(self.finish, "", logprobs)
        return Choice(self.finish, self.reply.text, logprobs, self.reply.stop)

    def finished(self, written: int, committed: bool) -> Finished:
        """The report of the whole request."""
        kept, others = self.choice, tuple(other.choice for other in self.others)
        usage = self.usage(written, committed)
        return Finished(kept.finish_reason, kept.text, usage, kept.logprobs, others, kept.stop)

    @property
    def said(self) -> int:
        """Tokens that were generated."""
        return (len(self.reply.tokens) if self.reply else 0) + int(self.end is not None)

    def usage(self, written: int, committed: bool) -> dict[str, Any]:
        """OpenAI's usage object with the `agentmem` extension."""
        completion = sum(s.said for s in (self, *self.others))
        memory = MemoryUsage(
            agent=self.request.agent,
            session=self.request.session,
            state_before=self.state_before,
            exact_tokens=self.exact,
            composed_tokens=self.composed,
            compressed_tokens=(self.before or self).compressed,
            evicted_tokens=self.past.shown.gap if self.past.shown is not None else 0,
            prefilled_tokens=len(self.ids) - (self.before or self).reused - self.composed,
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
            "prompt_tokens_details": {"cached_tokens": self.exact},
            "agentmem": dict(memory),
        }
