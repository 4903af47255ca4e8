"""What enters the engine and what comes out of it. No MLX in here: these objects cross threads."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from agentmem.compose.reuse import PLANNERS, REUSES, Planner, Reuse
from agentmem.errors import AgentMemError, BadRequest
from agentmem.model.grammar import Constraint

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")

State = Literal["hot", "warm", "cold"]
FinishReason = Literal["stop", "length", "cancelled"]

Parent = tuple[str, str | None]
"""An agent, and which of its sessions."""

MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20


def check_name(name: str, what: str = "agent") -> str:
    """Return `name` when it is a legal agent or session name; raises BadRequest otherwise."""
    if not NAME.fullmatch(name) or ".." in name:
        raise BadRequest(
            f"{what} names are 1-128 characters of A-Z a-z 0-9 . _ : @ - that start with a letter or digit "
            f"and hold no '..'; got {name[:40]!r}",
            param=what,
        )
    return name


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy. `seed` makes a sampled reply repeatable.

    `repetition_penalty` divides what speaks for the tokens of the prompt and of the reply; 1 changes nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class ChatRequest:
    """One turn of one agent's session.

    `persist=False` makes a new agent that lives in RAM only. `messages` are normalised: `{"role": system|user|assistant|tool,
    "content": str}`, and `tool_calls` or `tool_call_id` in OpenAI's shape. With `history="client"` they are the whole
    conversation, with `"server"` they follow the session's stored conversation. `prompt`, a text or token ids, is what the model
    reads instead of messages in its chat template. Without `generate` the prompt is only read. `constraint` is what replies may
    say. If this request makes the agent, it is recorded as a fork of the first of `parents` that there is. `n` replies are made
    to one prompt; the session keeps the first. `top_logprobs`: how many of the likeliest tokens to report beside each token of
    a reply, 0 for the token alone, None for nothing. `reuse`: see `Reuse`; None for what the agent has. `planner` is how it is
    composed, if it is; None for the agent's. For `keep_s` seconds the agent's state stays as if it were pinned. What is
    read for a `job` is read in parts, while nobody else is there.
    """

    agent: str
    messages: list[dict[str, Any]]
    session: str = "default"
    namespace: str = "default"
    history: Literal["client", "server"] = "client"
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    persist: bool | None = None
    identity_source: str = "agentmem"
    tools: list[dict[str, Any]] | None = None
    constraint: Constraint | None = None
    prompt: str | list[int] | None = None
    generate: bool = True
    parents: tuple[Parent, ...] = ()
    keep_s: float = 0.0
    n: int = 1
    top_logprobs: int | None = None
    reuse: Reuse | None = None
    planner: Planner | None = None
    job: str | None = None

    def __post_init__(self) -> None:
        check_name(self.agent)
        check_name(self.session, "session")
        check_name(self.namespace, "namespace")
        if not self.messages:
            raise BadRequest("messages is empty; send at least one message", param="messages")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadRequest("max_tokens must be at least 1", param="max_tokens")
        if self.reuse is not None and self.reuse not in REUSES:
            raise BadRequest(f"reuse is one of {', '.join(REUSES)}", param="reuse")
        if self.planner is not None and self.planner not in PLANNERS:
            raise BadRequest(f"planner is one of {', '.join(PLANNERS)}", param="planner")
        if not 1 <= self.n <= MAX_CHOICES:
            raise BadRequest(f"n must be 1 to {MAX_CHOICES}", param="n")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise BadRequest(f"top_logprobs must be 0 to {MAX_TOP_LOGPROBS}", param="top_logprobs")


class MemoryUsage(TypedDict):
    """The `usage.agentmem` object. Times in milliseconds, everything else in tokens.

    `compressed_tokens` of the prompt are remembered behind a shortened past; `evicted_tokens` of these have no state any more.
    """

    agent: str
    session: str
    state_before: State
    exact_tokens: int
    composed_tokens: int
    compressed_tokens: int
    evicted_tokens: int
    prefilled_tokens: int
    restored_tokens: int
    restore_ms: float
    prefill_ms: float
    ttft_ms: float
    bytes_written: int
    committed: bool


@dataclass(frozen=True, slots=True)
class Started:
    """The request was planned: how much of the prompt is already remembered, and how much is composed."""

    agent: str
    session: str
    prompt_tokens: int
    cached_tokens: int
    state_before: State
    composed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of a reply: its bytes, the natural logarithm of its probability, the likeliest tokens at its place."""

    token: int
    piece: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


Logprobs = tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of the reply `index`. `logprobs`, when asked for, are of the tokens whose text is now shown."""

    text: str
    index: int = 0
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the replies of a turn. `stop` is the stop string that ended it."""

    finish_reason: FinishReason
    text: str
    logprobs: Logprobs | None = None
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The turn is over; with commit policy `full` it is on disk. `usage` has OpenAI's shape plus `agentmem`.

    The first three fields, `logprobs` and `stop` are of the reply that is kept, `others` are the replies after it.
    """

    finish_reason: FinishReason
    text: str
    usage: dict[str, Any]
    logprobs: Logprobs | None = None
    others: tuple[Choice, ...] = ()
    stop: str | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All replies, in order."""
        return (Choice(self.finish_reason, self.text, self.logprobs, self.stop), *self.others)


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed alone; nothing of it was kept that was not kept before."""

    error: AgentMemError


Event = Started | Delta | Finished | Failed


class Ticket:
    """The caller's hold on a submitted request. `cancel` is safe from any thread, any number of times."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop decoding soon; what was prefilled stays remembered."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


class AgentInfo(TypedDict):
    """One agent as `agents` and `show` report it. Times are epoch seconds.

    `disk_bytes` is its share of everything on disk; `unique_bytes` and `shared_bytes` are rows that only it, and that other
    agents too, use. `reuse` is what its prompts may use of remembered state, `planner` how they are composed, `policy` how much
    of its past it keeps at hand. `encrypted` says where the key is (off, file, keyring), `locked` that it is not there.
    `lineage` says what the agent was forked from: parent, session, turn.
    """

    agent: str
    namespace: str
    model: str
    state: State
    sessions: list[str]
    tokens: int
    turns: int
    ram_bytes: int
    disk_bytes: int
    unique_bytes: int
    shared_bytes: int
    fp16_bytes: int
    prompt_tokens: int
    cached_tokens: int
    saved_ms: float | None
    created: float
    last_used: float
    pinned: bool
    keep_until: float | None
    persist: bool
    reuse: Reuse
    planner: Planner
    policy: dict[str, Any]
    quota_bytes: int | None
    encrypted: str
    locked: bool
    lineage: dict[str, Any] | None
