"""The body of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from agentmem.api.errors import invalid, unsupported
from agentmem.api.fields import MAX_STOPS, Body, SampledBody, Stops, StreamOptions, Tokens
from agentmem.api.message import Find, Message
from agentmem.api.tools import MAX_TOOLS, Choice, Function, FunctionTool, Tools
from agentmem.engine.request import MAX_CHOICES, MAX_TOP_LOGPROBS


def _functions_only(value: Any) -> Any:
    """Tools without those that only another service can run: harnesses send them along."""
    if not isinstance(value, list):
        return value
    return [
        tool for tool in value if not isinstance(tool, dict) or tool.get("type", "function") == "function"
    ]


class SchemaFormat(Body):
    """A JSON schema that the reply must follow."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Body):
    """What a reply must be: any text, any JSON object, or the value of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise invalid("needs json_schema.schema")
        return self

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema of the reply; None for any text."""
        if self.type == "text":
            return None
        given = self.json_schema.schema_ if self.json_schema is not None else None
        return given if self.type == "json_schema" else {"type": "object"}


class ChatBody(SampledBody):
    """One turn. Messages are the whole conversation, or (`agentmem.history`: "server") follow it."""

    messages: list[Message] = Field(min_length=1)
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stop: Stops = Field(default=None, max_length=MAX_STOPS)
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[FunctionTool] | None, BeforeValidator(_functions_only)] = Field(
        default=None, max_length=MAX_TOOLS
    )
    tool_choice: Choice | None = None
    parallel_tool_calls: StrictBool | None = None
    functions: list[Function] | None = Field(default=None, max_length=MAX_TOOLS)
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None

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
    def opening(self) -> Any:
        system = [message.content for message in self.messages if message.role in ("system", "developer")]
        return [system, [tool.model_dump(exclude_none=True) for tool in self.tools or ()]]

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

    def normalised(self, find: Find) -> list[dict[str, Any]]:
        """The conversation as the engine takes it, with the texts of its documents. Raises NotFound."""
        return [message.normalised(find) for message in self.messages]

    def tooling(self) -> Tools:
        """Its tools. Raises BadRequest."""
        functions = [*(tool.function for tool in self.tools or ()), *(self.functions or ())]
        return Tools.chosen(
            [function.normalised() for function in functions], self.tool_choice, self.parallel_tool_calls
        )
