"""Bodies of the native routes: what they may hold, and within which limits. Unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictFloat, StrictInt, model_validator

from agentmem.api.errors import invalid
from agentmem.api.fields import INT64, MAX_COUNT, Body
from agentmem.api.message import Find, Message, Text
from agentmem.compose.reuse import Planner, Reuse
from agentmem.episode.policy import Episodic, Full, MemoryPolicy, Window
from agentmem.tokens import TokenScope


def _by_kind(value: Any) -> Any:
    """A policy as the model of its kind, so that errors name its fields and not the kinds that it could have been."""
    for kind in (Full, Episodic, Window):
        if isinstance(value, dict) and value.get("kind") == kind.model_fields["kind"].default:
            return kind.model_validate(value)
    return value


class PolicyBody(Body):
    """`PATCH /v1/agents/{agent}`: what is named changes; a quota of null takes it away.

    `policy` says how much of its past the agent keeps at hand; null is all of it. Its unknown fields are refused.
    """

    pinned: StrictBool | None = None
    quota_bytes: Annotated[StrictInt, Field(ge=1, lt=INT64)] | None = None
    reuse: Reuse | None = None
    planner: Planner | None = None
    policy: Annotated[MemoryPolicy | None, BeforeValidator(_by_kind)] = None

    def changes(self) -> dict[str, Any]:
        """The policies that the request names."""
        plain = self.model_dump(include={"pinned", "quota_bytes", "reuse", "planner"} & self.model_fields_set)
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
    """`POST /v1/compose/verify`: templates of one namespace, or of all; which planner is measured."""

    namespace: str | None = None
    planner: Planner | None = None


class RotateBody(Body):
    """`POST /v1/token/rotate`: which of the two tokens."""

    scope: TokenScope = "all"


class RepairBody(Body):
    """`POST /v1/store/repair`: empty the quarantine folder, too."""

    purge: StrictBool = False


class AppendBody(Body):
    """`POST /v1/agents/{agent}/append`: messages, or one text with its role; in the `background` while nobody else is there."""

    messages: list[Message] | None = Field(default=None, min_length=1)
    text: Text | None = None
    role: Literal["user", "system"] = "user"
    session: str = "default"
    background: StrictBool = False

    @model_validator(mode="after")
    def _one_of(self) -> AppendBody:
        if (self.messages is None) == (self.text is None):
            raise invalid("send either messages or text")
        return self

    def normalised(self, find: Find) -> list[dict[str, Any]]:
        """The messages as the engine takes them, with the texts of their documents. Raises NotFound."""
        if self.messages is None:
            return [{"role": self.role, "content": self.text}]
        return [message.normalised(find) for message in self.messages]
