"""Requests as coding harnesses send them, written from their documented shapes: three turns of each, with their headers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

SYSTEM = (
    "You are a coding agent. You work in a repository, read files before you change them, and say what you did. "
    * 6
)
TASK = "The build fails with a missing header. Find out why, and mend it."
OUTPUT = (
    "src/main.c:3: fatal error: config.h: no such file. The file is made by ./configure, which was not run. "
    * 3
)
NEXT = "Now do the same for the tests."

Reply = dict[str, Any]


class Turn(NamedTuple):
    """A request: its route, headers and body."""

    route: str
    headers: dict[str, str]
    body: dict[str, Any]


class Harness(NamedTuple):
    """One harness. `turn(n, replies)` is its n-th request after these replies; `agent` is what the daemon calls it."""

    name: str
    agent: str
    turn: Callable[[int, list[Reply]], Turn]


def claude_code(n: int, replies: list[Reply]) -> Turn:
    """Blocks become strings between turns, breakpoints move, and a number in the system prompt changes."""
    moving = {"cache_control": {"type": "ephemeral"}}
    system = [
        {
            "type": "text",
            "text": f"x-anthropic-billing-header: cc_version=2.1.30; cc_entrypoint=cli; cch={n}a{n}f1;",
        },
        {"type": "text", "text": SYSTEM, **moving},
    ]
    task: Any = [{"type": "text", "text": TASK, **moving}] if n == 0 else TASK
    messages: list[dict[str, Any]] = [{"role": "user", "content": task}]
    for i, reply in enumerate(replies):
        messages.append(
            {"role": "assistant", "content": [{"type": "text", "text": reply["content"][0]["text"]}]}
        )
        last = {"type": "text", "text": OUTPUT if i == 0 else NEXT, **(moving if i == n - 1 else {})}
        messages.append({"role": "user", "content": [last]})
    tools = [
        {"name": "Read", "description": "Read a file.", "input_schema": {"type": "object", "properties": {}}}
    ]
    body = {
        "model": "claude-sonnet-4-5", "max_tokens": 8, "stream": False, "system": system, "messages": messages,
        "tools": tools, "tool_choice": {"type": "none"}, "thinking": {"type": "adaptive"}, "temperature": 0,
        "metadata": {"user_id": '{"device_id": "d", "session_id": "c0ffee"}'}, "context_management": {"edits": []},
    }  # fmt: skip
    return Turn("/v1/messages?beta=true", {"x-claude-code-session-id": "c0ffee"}, body)


def codex(n: int, replies: list[Reply]) -> Turn:
    """Stateless, strictly growing, with tools that only OpenAI runs."""
    items: list[dict[str, Any]] = [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "Sandbox: read-only."}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": TASK}]},
    ]
    for i, reply in enumerate(replies):
        items += [*reply["output"], {"type": "reasoning", "summary": [], "encrypted_content": "x"}]
        text = OUTPUT if i == 0 else NEXT
        items.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]})
    tools = [
        {
            "type": "function",
            "name": "shell",
            "parameters": {"type": "object", "properties": {}},
            "strict": False,
        },
        {"type": "web_search"},
        {"type": "namespace", "name": "apps", "tools": []},
    ]
    body = {
        "model": "default", "instructions": SYSTEM, "input": items, "tools": tools, "tool_choice": "none", "store": False,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "t-77", "max_output_tokens": 8,
        "reasoning": {"effort": "medium"}, "client_metadata": {"a": "b"}, "temperature": 0,
    }  # fmt: skip
    return Turn("/v1/responses", {"session-id": "s-77", "thread-id": "t-77"}, body)


def opencode(n: int, replies: list[Reply]) -> Turn:
    """Chat completions; the content of a message is now a text, now a list of one."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": TASK},
    ]
    for i, reply in enumerate(replies):
        messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
        text = OUTPUT if i == 0 else NEXT
        messages.append({"role": "user", "content": text if i % 2 else [{"type": "text", "text": text}]})
    headers = {"x-session-affinity": "ses_9", "x-session-id": "ses_9"}
    return Turn("/v1/chat/completions", headers, {"model": "default", "messages": messages, "max_tokens": 8})


def open_webui(n: int, replies: list[Reply]) -> Turn:
    """Chat completions of a person who chats."""
    route, _, body = opencode(n, replies)
    headers = {"X-OpenWebUI-Chat-Id": "w-5", "X-OpenWebUI-User-Id": "u-1"}
    return Turn(route, headers, body | {"temperature": 0, "chat_id": "w-5"})


HARNESSES = (
    Harness("claude-code", "claude-code", claude_code),
    Harness("codex", "codex", codex),
    Harness("opencode", "opencode", opencode),
    Harness("open-webui", "open-webui", open_webui),
)
