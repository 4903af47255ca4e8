"""Bodies of Anthropic's routes, and what they say in the engine's words."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StrictBool,
    StrictInt,
    model_validator,
)

from agentmem.api.errors import invalid, unsupported
from agentmem.api.fields import MAX_COUNT, MAX_STOPS, TTL, Body, SampledBody, StopText
from agentmem.api.message import (
    Content,
    Find,
    Name,
    Spelled,
    Text,
    content_of,
    reference,
    spelled,
    steady,
    text_of,
    well_formed,
)
from agentmem.api.tools import MAX_TOOLS, Tools

CALL_ID = "toolu_"
SILENT = frozenset({"thinking", "redacted_thinking"})
"""Blocks that other models made for themselves."""


class Block(Body):
    """A piece of content. Which fields it needs depends on its type."""

    model_config = ConfigDict(extra="allow")

    type: str


def _blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class AnthropicMessage(Body):
    """One message; `content` is a text or a list of blocks."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_blocks, json_schema_input_type=str | list[Block])]


class AnthropicTool(Body):
    """A tool. Those that Anthropic runs itself have a type of their own and no schema; they are left out."""

    type: str | None = None
    name: Name
    description: Text | None = None
    input_schema: dict[str, Any] | None = None

    @property
    def ours(self) -> bool:
        return self.type in (None, "custom")

    def normalised(self) -> dict[str, Any]:
        """The tool as the engine takes it."""
        described = {"description": self.description} if self.description is not None else {}
        schema = {"parameters": self.input_schema} if self.input_schema is not None else {}
        return {"type": "function", "function": {"name": self.name, **described, **schema}}


class ToolChoice(Body):
    """What must be called: `any` tool, the one of a name, none, or what the model likes."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: StrictBool | None = None


class PromptBody(SampledBody):
    """`POST /v1/messages/count_tokens`."""

    messages: list[AnthropicMessage] = Field(min_length=1)
    system: Annotated[Spelled, BeforeValidator(content_of, json_schema_input_type=Content)] = None
    tools: list[AnthropicTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None

    _ttls: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _marked(cls, value: Any, validate: ModelWrapValidatorHandler[PromptBody]) -> PromptBody:
        """Breakpoints may stand on the request, its system prompt, its tools and its blocks."""
        body = validate(value)
        if isinstance(value, dict):
            lists = [value.get("system"), value.get("tools"), *(m.get("content") for m in value["messages"])]
            marked = [value, *(part for one in lists if isinstance(one, list) for part in one)]
            controls = [part.get("cache_control") for part in marked if isinstance(part, dict)]
            found = [c["ttl"] for c in controls if isinstance(c, dict) and c.get("ttl") is not None]
            if any(not (isinstance(ttl, str) and TTL.fullmatch(ttl)) for ttl in found):
                raise invalid("the ttl of a cache_control is a time like '5m' or '1h'")
            body._ttls = found
        return body

    @property
    def marked_ttls(self) -> list[str]:
        return self._ttls

    @property
    def opening(self) -> Any:
        return [steady(str(self.system or "")), [tool.normalised() for tool in self.tools or () if tool.ours]]

    def normalised(self, find: Find) -> list[dict[str, Any]]:
        """The conversation as the engine takes it, with the texts of its documents.

        Raises NotFound, and a validation error for content that is not text.
        """
        told = steady(spelled(self.system or "", find))
        said = [{"role": "system", "content": told}] if told else []
        for message in self.messages:
            said += _said(message, find)
        return said

    def tooling(self) -> Tools:
        """Its tools. Raises BadRequest."""
        choice = self.tool_choice or ToolChoice(type="auto")
        return Tools(
            [tool.normalised() for tool in self.tools or () if tool.ours],
            must=choice.type in ("any", "tool"),
            name=choice.name if choice.type == "tool" else None,
            parallel=choice.disable_parallel_tool_use is False,
            silent=choice.type == "none",
        )


class AnthropicBody(PromptBody):
    """`POST /v1/messages`."""

    max_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)]
    stop_sequences: list[StopText] | None = Field(default=None, max_length=MAX_STOPS)


def _said(message: AnthropicMessage, find: Find) -> list[dict[str, Any]]:
    """A message in OpenAI's shape: results of tools come before what the user says with them."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for block in message.content:
        fields = block.model_extra or {}
        if block.type == "tool_use":
            calls.append(_call(fields))
        elif block.type == "tool_result":
            results.append(_result(fields, find))
        elif block.type not in SILENT:
            texts.append(_text(block.type, fields, find))
    content = "".join(texts)
    if message.role == "system":
        return [{"role": "system", "content": steady(content)}]
    if message.role == "assistant":
        return [{"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}]
    return [*results, *([{"role": "user", "content": content}] if content or not results else [])]


def _text(kind: str, fields: dict[str, Any], find: Find) -> str:
    if (named := reference({"type": kind, **fields})) is not None:
        return find(named)
    source = fields.get("source")
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        fields = {"text": source.get("data")}
    elif kind != "text":
        raise unsupported(f"content blocks of type {kind[:40]!r} are not supported; send text")
    if not isinstance(fields.get("text"), str):
        raise invalid("a text block needs a string in its field 'text'")
    return well_formed(fields["text"])


def _call(fields: dict[str, Any]) -> dict[str, Any]:
    name, given = fields.get("name"), fields.get("input")
    if not isinstance(name, str) or not isinstance(given, dict):
        raise invalid("a tool_use block needs a name, and an object in its field 'input'")
    function = {"name": well_formed(name), "arguments": well_formed(json.dumps(given, ensure_ascii=False))}
    return {"id": str(fields.get("id") or ""), "type": "function", "function": function}


def _result(fields: dict[str, Any], find: Find) -> dict[str, Any]:
    content = text_of(fields.get("content") or "")
    content = spelled(content, find) if isinstance(content, list) else content
    if not isinstance(content, str):
        raise invalid("the content of a tool_result block is a string or a list of text blocks")
    return {
        "role": "tool",
        "content": well_formed(content),
        "tool_call_id": str(fields.get("tool_use_id") or ""),
    }
