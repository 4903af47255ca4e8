"""Fields that requests of several routes share, and their limits. Unknown fields are ignored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    field_validator,
)

from agentmem.api.errors import invalid
from agentmem.api.message import Text
from agentmem.compose.reuse import Planner, Reuse
from agentmem.engine.request import Sampling

MAX_COUNT = 10**9
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
INT64 = 1 << 63

Tokens = Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)]
Penalty = Annotated[StrictFloat, Field(ge=-2, le=2, allow_inf_nan=False)]
Share = Annotated[StrictFloat, Field(ge=0, le=1, allow_inf_nan=False)]
Bias = Annotated[StrictFloat, Field(ge=-100, le=100, allow_inf_nan=False)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


def as_list(value: Any) -> Any:
    """One text as a list of one."""
    return [value] if isinstance(value, str) else value


UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
TTL = re.compile(r"^[0-9]{1,5}[smhd]$")
Ttl = Annotated[str, Field(pattern=TTL.pattern)]
Stops = Annotated[
    list[StopText] | None, BeforeValidator(as_list, json_schema_input_type=str | list[StopText] | None)
]


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


def seconds(text: str) -> float:
    """A time to live, like "5m"."""
    return int(text[:-1]) * UNITS[text[-1]]


class StreamOptions(Body):
    include_usage: StrictBool | None = None


class AgentFields(Body):
    """The `agentmem` object of a request: who speaks, whether the messages are the whole conversation, and what may be reused.

    `parent` is the agent that a new one goes on from, or `agent/session`.
    """

    agent: str | None = None
    session: str | None = None
    parent: str | None = None
    namespace: str | None = None
    history: Literal["client", "server"] = "client"
    reuse: Reuse | None = None
    planner: Planner | None = None
    persist: StrictBool | None = None


class CacheOptions(Body):
    """What a client asks of the memory in the words of prompt caches.

    `prewarm`: read the prompt, and say nothing. `ttl`: keep the agent's state for so long, like "30m", whatever needs room.
    """

    prewarm: StrictBool | None = None
    ttl: Ttl | None = None


class NamedBody(Body):
    """A request that may say who speaks, in several ways."""

    model: str | None = None
    agentmem: AgentFields = Field(default_factory=AgentFields)
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None

    @field_validator("agentmem", mode="before", json_schema_input_type=AgentFields | None)
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return {} if value is None else value

    @property
    def opening(self) -> Any:
        """What tells agents apart that nobody names: their system prompt and tools, as JSON."""
        raise NotImplementedError

    @property
    def prewarms(self) -> bool:
        """Whether the prompt is only to be read."""
        return bool(self.prompt_cache_options and self.prompt_cache_options.prewarm)

    @property
    def keep_s(self) -> float:
        """How long the agent's state is to stay where it is, in seconds."""
        asked = [self.prompt_cache_options.ttl] if self.prompt_cache_options else []
        return max([seconds(t) for t in [*asked, *self.marked_ttls] if t], default=0.0) or (
            seconds("24h") if self.prompt_cache_retention == "24h" else 0.0
        )

    @property
    def marked_ttls(self) -> list[str]:
        """Times to live that the content itself is marked with."""
        return []

    def engine_fields(self) -> dict[str, Any]:
        """What the engine is told of the `agentmem` object."""
        asked = self.agentmem
        return {
            "history": asked.history, "persist": asked.persist, "reuse": asked.reuse, "planner": asked.planner,
            "keep_s": self.keep_s,
        }  # fmt: skip


class SampledBody(NamedBody):
    """A request for a reply: how its tokens are chosen. What it leaves out keeps its default."""

    stream: StrictBool | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)] | None = None
    seed: Annotated[StrictInt, Field(ge=-INT64, lt=INT64)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[StrictFloat, Field(gt=0, le=2, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, Bias] | None = Field(default=None, max_length=MAX_BIASES)

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise invalid(f"keys are token ids, got {key[:40]!r}")
        return value

    def sampling(self) -> Sampling:
        """How to choose tokens."""
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
