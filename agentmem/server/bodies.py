"""Request bodies: what they may hold, and within which limits. Unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from agentmem.compose.reuse import Planner, Reuse
from agentmem.engine.request import MAX_CHOICES, MAX_TOP_LOGPROBS, Sampling
from agentmem.episode.policy import Episodic, Full, MemoryPolicy, Window
from agentmem.server.errors import invalid, unsupported
from agentmem.server.messages import Message, Text
from agentmem.tokens import TokenScope

MAX_COUNT = 10**9
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
INT64 = 1 << 63

Tokens = Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)]
Penalty = Annotated[StrictFloat, Field(ge=-2, le=2, allow_inf_nan=False)]
Share = Annotated[StrictFloat, Field(ge=0, le=1, allow_inf_nan=False)]
Bias = Annotated[StrictFloat, Field(ge=-100, le=100, allow_inf_nan=False)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _by_kind(value: Any) -> Any:
    """A policy as the model of its kind, so that errors name its fields and not the kinds that it could have been."""
    for kind in (Full, Episodic, Window):
        if isinstance(value, dict) and value.get("kind") == kind.model_fields["kind"].default:
            return kind.model_validate(value)
    return value


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StreamOptions(Body):
    include_usage: StrictBool | None = None


class AgentFields(Body):
    """The `agentmem` object of a request: who speaks, whether the messages are the whole conversation, and what may be reused."""

    agent: str | None = None
    session: str | None = None
    namespace: str | None = None
    history: Literal["client", "server"] = "client"
    reuse: Reuse | None = None
    planner: Planner | None = None
    persist: StrictBool | None = None


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stop: Annotated[list[StopText] | None, BeforeValidator(_as_list)] = Field(
        default=None, max_length=MAX_STOPS
    )
    temperature: Annotated[StrictFloat, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)] | None = None
    seed: Annotated[StrictInt, Field(ge=-INT64, lt=INT64)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[StrictFloat, Field(gt=0, le=2, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, Bias] | None = Field(default=None, max_length=MAX_BIASES)

    agentmem: AgentFields = Field(default_factory=AgentFields)
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None

    @field_validator("agentmem", mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise invalid(f"keys are token ids, got {key[:40]!r}")
        return value

    @field_validator("tools", "functions")
    @classmethod
    def _no_tools(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise unsupported("tools are not supported; leave them out")
        return value

    @field_validator("response_format")
    @classmethod
    def _plain_text(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type") != "text":
            raise unsupported('only {"type": "text"} is supported')
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _beside_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and info.data.get("logprobs", True) is not True:
            raise invalid("needs logprobs: true")
        return value

    @field_validator("modalities")
    @classmethod
    def _text_only(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and value != ["text"]:
            raise unsupported('only ["text"] is supported')
        return value

    @property
    def reply_limit(self) -> int | None:
        """Most tokens of the reply, None when the request does not say."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wants_usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def ranked(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def sampling(self) -> Sampling:
        """How to choose tokens; what the request leaves out keeps its default."""
        named = (
            "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
        )  # fmt: skip
        given: dict[str, Any] = {
            name: getattr(self, name) for name in named if getattr(self, name) is not None
        }
        if self.seed is not None:
            given["seed"] = self.seed % (1 << 64)
        if self.logit_bias:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return Sampling(**given)


class PolicyBody(Body):
    """`PATCH /v1/agents/{agent}`: what is named changes; a quota of null takes it away.

    `policy` says how much of its past the agent keeps at hand; null is all of it. Its unknown fields are refused.
    """

    pinned: StrictBool | None = None
    quota_bytes: Annotated[StrictInt, Field(ge=1, lt=INT64)] | None = None
    reuse: Reuse | None = None
    policy: Annotated[MemoryPolicy | None, BeforeValidator(_by_kind)] = None

    def changes(self) -> dict[str, Any]:
        """The policies that the request names."""
        plain = self.model_dump(include={"pinned", "quota_bytes", "reuse"} & self.model_fields_set)
        changes = {k: v for k, v in plain.items() if v is not None or k == "quota_bytes"}
        if "policy" in self.model_fields_set:
            kept = self.policy
            changes["memory"] = None if kept is None or isinstance(kept, Full) else kept.model_dump()
        return changes


class CreateBody(PolicyBody):
    """`POST /v1/agents`: an agent without turns. `persist: false` keeps it off the disk.

    `encrypt` says where the key of what it leaves there is kept; without it the daemon's setting decides.
    """

    agent: str
    persist: StrictBool = True
    encrypt: Literal["off", "file", "keyring"] | None = None

    def asked(self) -> dict[str, Any]:
        """All that is asked of the new agent."""
        persist = {} if self.persist else {"persist": False}
        encrypt = {} if self.encrypt is None else {"encrypt": self.encrypt}
        return self.changes() | persist | encrypt


class ForkBody(Body):
    """`POST /v1/agents/{agent}/fork`: the new agent's name; which session, and after which turn."""

    agent: str
    session: str | None = None
    at: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = None


class PruneBody(Body):
    """`POST /v1/store/prune`: state of agents not used for `older_s` seconds."""

    older_s: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1e10)]
    namespace: str | None = None
    dry_run: StrictBool = False


class VerifyBody(Body):
    """`POST /v1/store/verify`: read every byte or headers only; have the next start rebuild the index."""

    deep: StrictBool = False
    rebuild: StrictBool = False


class TextBody(Body):
    """`PUT /v1/templates/{name}` and `/v1/documents/{name}`."""

    text: Annotated[Text, Field(min_length=1)]


class CalibrateBody(Body):
    """`POST /v1/compose/verify`: templates of one namespace, or of all."""

    namespace: str | None = None


class RotateBody(Body):
    """`POST /v1/token/rotate`: which of the two tokens."""

    scope: TokenScope = "all"


class RepairBody(Body):
    """`POST /v1/store/repair`: empty the quarantine folder, too."""

    purge: StrictBool = False


class AppendBody(Body):
    """`POST /v1/agents/{agent}/append`: messages, or one text with its role."""

    messages: list[Message] | None = Field(default=None, min_length=1)
    text: Text | None = None
    role: Literal["user", "system"] = "user"
    session: str = "default"

    @model_validator(mode="after")
    def _one_of(self) -> AppendBody:
        if (self.messages is None) == (self.text is None):
            raise invalid("send either messages or text")
        return self

    def normalised(self) -> list[dict[str, Any]]:
        """The messages as the engine takes them."""
        if self.messages is None:
            return [{"role": self.role, "content": self.text}]
        return [message.normalised() for message in self.messages]
