"""Items of the Responses API: what clients give, what replies become, and the messages that both stand for."""

from __future__ import annotations

import uuid
from typing import Any

from pydantic_core import PydanticCustomError

from agentmem.api.chat import token_field
from agentmem.api.exchange import Reply
from agentmem.api.message import Find, spelled, steady, text_of, well_formed
from agentmem.engine.request import Logprobs
from agentmem.errors import BadRequest
from agentmem.model.calls import Call

SILENT = frozenset({"reasoning", "compaction"})
"""Items that other models made for themselves."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def new_id(kind: str) -> str:
    """An id that nobody can guess; `kind` is its prefix."""
    return f"{kind}_{uuid.uuid4().hex}"


def given(value: str | list[dict[str, Any]], param: str = "input") -> list[dict[str, Any]]:
    """The items of a request, each with an id. Raises BadRequest for what cannot be one."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}] if value else []
    items = []
    for i, item in enumerate(value):
        kind = item.get("type") or "message"
        if kind in SILENT:
            continue
        known = {"type": kind, **item}
        known["id"] = item["id"] if isinstance(item.get("id"), str) and item["id"] else new_id("item")
        try:
            _message(known, str)
        except PydanticCustomError as error:
            raise BadRequest(f"{param}.{i}: {error.message()}", param=f"{param}.{i}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise BadRequest(
                f"{param}.{i}: an item of type {kind!r} lacks {error}", param=f"{param}.{i}"
            ) from error
        items.append(known)
    return items


def shown(item: dict[str, Any]) -> dict[str, Any]:
    """An item as lists of them have it: the content of a message is parts, also where it was given as one text."""
    content = item.get("content")
    if item["type"] != "message" or not isinstance(content, str):
        return item
    part = text_part(content) if item["role"] == "assistant" else {"type": "input_text", "text": content}
    return {**item, "content": [part]}


def messages(instructions: str | None, items: list[dict[str, Any]], find: Find) -> list[dict[str, Any]]:
    """The conversation as the engine takes it: calls belong to the reply that they follow. Raises NotFound for documents."""
    found: list[dict[str, Any]] = []
    if instructions:
        found.append({"role": "system", "content": steady(instructions)})
    for item in items:
        message = _message(item, find)
        last = found[-1] if found else None
        if item["type"] == "function_call" and last is not None and last["role"] == "assistant":
            last.setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            found.append(message)
    return found


def _message(item: dict[str, Any], find: Find) -> dict[str, Any]:
    kind = item["type"]
    if kind == "message":
        content = text_of(item["content"])
        content = spelled(content, find) if isinstance(content, list) else content
        if item["role"] not in ROLES or not isinstance(content, str):
            raise TypeError("a role and a text")
        role = ROLES[item["role"]]
        return {
            "role": role,
            "content": steady(well_formed(content)) if role == "system" else well_formed(content),
        }
    if kind == "function_call":
        function = {"name": well_formed(item["name"]), "arguments": well_formed(item["arguments"])}
        call = {"id": str(item["call_id"]), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = text_of(item["output"])
        if not isinstance(output, str):
            raise TypeError("a text as its output")
        return {"role": "tool", "content": well_formed(output), "tool_call_id": str(item["call_id"])}
    raise BadRequest(
        f"items of type {str(kind)[:40]!r} are not supported", param="input", code="unsupported_parameter"
    )


def text_item(id_: str, text: str, status: str, logprobs: Logprobs | None = None) -> dict[str, Any]:
    """The message of a reply."""
    return {
        "id": id_, "type": "message", "role": "assistant", "status": status, "content": [text_part(text, logprobs)],
    }  # fmt: skip


def text_part(text: str, logprobs: Logprobs | None = None) -> dict[str, Any]:
    """The text of a reply."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs_field(logprobs)}


def logprobs_field(logprobs: Logprobs | None) -> list[dict[str, Any]]:
    """Log probabilities in the shape of this API."""
    return [
        {**token_field(one), "top_logprobs": [token_field(other) for other in one.top]}
        for one in logprobs or ()
    ]


def call_item(id_: str, call: Call, status: str) -> dict[str, Any]:
    """A call of a tool."""
    return {
        "id": id_, "type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments,
        "status": status,
    }  # fmt: skip


def said(reply: Reply) -> list[dict[str, Any]]:
    """A whole reply as items: its text, where it has some, and its calls."""
    status = "incomplete" if reply.finish == "length" else "completed"
    texts = (
        [text_item(new_id("msg"), reply.text, status, reply.logprobs)]
        if reply.text or not reply.calls
        else []
    )
    return [*texts, *(call_item(new_id("fc"), call, status) for call in reply.calls)]
