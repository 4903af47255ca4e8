"""The body of `POST /v1/responses`, and what a response repeats of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, field_validator

from agentmem.api.chat_body import ResponseFormat
from agentmem.api.errors import unsupported
from agentmem.api.fields import Body, CacheOptions, SampledBody, Tokens
from agentmem.api.message import Name, Text
from agentmem.api.tools import MAX_TOOLS, Function, NamedFunction, NamedTool, Tools
from agentmem.engine.request import MAX_TOP_LOGPROBS

MAX_ITEMS = 100_000
LOGPROBS = "message.output_text.logprobs"


class ConversationId(Body):
    id: str


class TextFormat(Body):
    """What the text of a reply must be; here the schema lies beside its name."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    name: str | None = None

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema of the reply; None for any text. Raises a validation error."""
        inner = {"json_schema": {"schema": self.schema_}} if self.type == "json_schema" else {}
        return ResponseFormat.model_validate({"type": self.type, **inner}).wanted


class TextOptions(Body):
    format: TextFormat | None = None

    @field_validator("format")
    @classmethod
    def _complete(cls, value: TextFormat | None) -> TextFormat | None:
        if value is not None:
            _ = value.wanted
        return value


class ResponsesTool(Function):
    """A function. Its fields lie beside its type here."""

    type: Literal["function"] = "function"
    strict: StrictBool | None = None

    def normalised(self) -> dict[str, Any]:
        return {
            "type": "function",
            "function": self.model_dump(exclude_none=True, exclude={"type", "strict"}),
        }


class ChosenFunction(Body):
    type: Literal["function"]
    name: Name


def _functions_only(value: Any) -> Any:
    """Tools without those that only another service can run: harnesses send them along."""
    if not isinstance(value, list):
        return value
    return [tool for tool in value if not isinstance(tool, dict) or tool.get("type") == "function"]


def _conversation(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


class ComparedCacheOptions(CacheOptions):
    comparison_response_id: str | None = None


class ResponsesBody(SampledBody):
    """One turn. `input` follows the conversation or the response that it names, or is the whole conversation."""

    input: Text | Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)] = ""
    instructions: Text | None = None
    previous_response_id: str | None = None
    conversation: Annotated[
        ConversationId | None,
        BeforeValidator(_conversation, json_schema_input_type=str | ConversationId | None),
    ] = None
    store: StrictBool | None = None
    background: StrictBool | None = None
    max_output_tokens: Tokens | None = None
    tools: Annotated[list[ResponsesTool] | None, BeforeValidator(_functions_only)] = Field(
        default=None, max_length=MAX_TOOLS
    )
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: StrictBool | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    prompt_cache_options: ComparedCacheOptions | None = None

    @field_validator("background")
    @classmethod
    def _at_once(cls, value: bool | None) -> bool | None:
        if value:
            raise unsupported("background responses are not supported")
        return value

    @property
    def opening(self) -> Any:
        return [self.instructions, [tool.model_dump(exclude_none=True) for tool in self.tools or ()]]

    @property
    def compared(self) -> str | None:
        """The response that the use of the memory is compared with."""
        return self.prompt_cache_options.comparison_response_id if self.prompt_cache_options else None

    @property
    def kept(self) -> bool:
        """Whether a later request can go on from this one by its id."""
        return self.store is not False

    @property
    def ranked(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None for no log probabilities."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) or self.top_logprobs else None

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        return self.text.format.wanted if self.text is not None and self.text.format is not None else None

    def tooling(self) -> Tools:
        """Its tools. Raises BadRequest."""
        choice = self.tool_choice
        return Tools.chosen(
            [tool.normalised() for tool in self.tools or ()],
            NamedTool(function=NamedFunction(name=choice.name))
            if isinstance(choice, ChosenFunction)
            else choice,
            self.parallel_tool_calls,
        )

    def repeated(self) -> dict[str, Any]:
        """What a response says of its request."""
        choice = self.tool_choice
        form = self.text.format if self.text is not None and self.text.format is not None else TextFormat()
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "conversation": {"id": self.conversation.id} if self.conversation else None,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": self.safety_identifier,
            "store": self.kept,
            "temperature": self.temperature if self.temperature is not None else 0.0,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice.model_dump() if isinstance(choice, ChosenFunction) else choice or "auto",
            "tools": [
                {"strict": False, "parameters": None, **t.model_dump(exclude_none=True)}
                for t in self.tools or ()
            ],
            "top_p": self.top_p if self.top_p is not None else 1.0,
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
            "user": self.user,
        }
