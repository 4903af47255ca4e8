"""Messages as clients send them, and as the engine takes them: one role, one text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from agentmem.server.errors import invalid, unsupported

TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def text_of(content: Any) -> Any:
    """A list of text parts as the one string they spell; other content unchanged.

    Two clients, or one client on two days, may send the same text in both forms: it must be the same prefix.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS:
            raise unsupported(f"content parts of type {str(kind)[:40]!r} are not supported; send text parts")
        if not isinstance(part.get("text"), str):
            raise invalid("a text part needs a string in its field 'text'")
        texts.append(part["text"])
    return "".join(texts)


def well_formed(text: str) -> str:
    """`text`, which JSON escapes may have filled with halves of characters; those can be no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid("the text holds half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(well_formed)]


class Message(BaseModel):
    """One message of a conversation. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | None, BeforeValidator(text_of)] = Field(
        default=None, description="a string, or a list of text parts"
    )
    tool_calls: list[Any] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.tool_calls:
            raise unsupported("messages with tool_calls are not supported")
        if self.content is None and self.role != "assistant":
            raise invalid(f"a message of role '{self.role}' needs content")
        return self

    def normalised(self) -> dict[str, Any]:
        """The message as the engine takes it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
