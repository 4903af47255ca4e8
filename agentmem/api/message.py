"""Messages as clients send them, and as the engine takes them: one role, one text, calls of tools beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from agentmem.api.errors import invalid, unsupported

Content = str | list[dict[str, Any] | str] | None
"""What clients may send as the text of a message."""
DOCUMENT = "document"
Find = Callable[[str], str]
"""The text of a registered document by its name. Raises NotFound."""
TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})
BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
"""What some versions of Claude Code write in front of the system prompt; its number changes with every request."""


class Reference(str):
    """A part of a content that stands for the text of a document; the string is its name."""


def text_of(content: Any) -> Any:
    """A list of text parts as the one string they spell, with documents among them as a list; other content unchanged.

    Two clients, or one client on two days, may send the same text in both forms: it must be the same prefix.
    """
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, str) else _text_of_part(part) for part in content]
    return parts if any(isinstance(part, Reference) for part in parts) else "".join(parts)


def content_of(content: Any) -> str | list[str] | None:
    """For validators: a text, a list of texts and references to documents, or None."""
    found = text_of(content)
    if found is not None and not isinstance(found, str | list):
        raise invalid("must be a string or a list of parts")
    return found if found is None else well_formed(found)


def spelled(content: str | list[str], find: Find) -> str:
    """The text of a content, that of its documents included. Raises NotFound."""
    if isinstance(content, str):
        return content
    return "".join(find(part) if isinstance(part, Reference) else part for part in content)


def reference(part: Mapping[str, Any]) -> Reference | None:
    """The document that a part stands for: `{"type": "document", "name": ...}`, or a file of that id; None for other parts."""
    kind, file, source = part.get("type"), part.get("file"), part.get("source")
    name = {
        DOCUMENT: part.get("name") or (source.get("file_id") if isinstance(source, dict) else None),
        "input_file": part.get("file_id"),
        "file": file.get("file_id") if isinstance(file, dict) else None,
    }.get(str(kind))
    return Reference(well_formed(name)) if isinstance(name, str) and name else None


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict) and (found := reference(part)) is not None:
        return found
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS:
        raise unsupported(
            f"content parts of type {str(kind)[:40]!r} are not supported; send text parts, or name a document"
        )
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise invalid("a text part needs a string in its field 'text'")
    return text


def well_formed(text: Any) -> Any:
    """`text`, or a list, which JSON escapes may have filled with halves of characters; those can be no tokens."""
    if isinstance(text, list):
        return [well_formed(part) for part in text]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid("the text holds half of a surrogate pair") from None
    return text


def steady(text: str) -> str:
    """A system prompt without what changes in it from request to request though nothing else does."""
    return BILLING.sub("", text)


Text = Annotated[str, AfterValidator(well_formed)]
Spelled = Any
"""What `content_of` gives: a text, texts with references among them, or None."""
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(well_formed)]


class CalledFunction(BaseModel):
    """A function and the JSON of its arguments."""

    model_config = ConfigDict(extra="ignore")

    name: Name
    arguments: Text = "{}"


class ToolCall(BaseModel):
    """A call in a reply that a client sends back."""

    model_config = ConfigDict(extra="ignore")

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One message of a conversation. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Spelled, BeforeValidator(content_of, json_schema_input_type=Content)] = Field(
        default=None, description="a string, or a list of text parts"
    )
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise invalid(f"a message of role '{self.role}' needs content")
        if self.tool_calls and self.role != "assistant":
            raise invalid("only messages of role 'assistant' have tool_calls")
        return self

    def normalised(self, find: Find) -> dict[str, Any]:
        """The message as the engine takes it, with the texts of its documents. Raises NotFound."""
        content = spelled(self.content or "", find)
        if self.role in ("system", "developer"):
            return {"role": "system", "content": steady(content)}
        if self.role in ("tool", "function"):
            ids = {"tool_call_id": self.tool_call_id} if self.tool_call_id else {}
            names = {"name": self.name} if self.name else {}
            return {"role": "tool", "content": content, **ids, **names}
        calls = {"tool_calls": [call.model_dump() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": self.role, "content": content, **calls}
