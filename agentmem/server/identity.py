"""Who is speaking: the first of several sources that names an agent. It never decides what is reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from agentmem.engine.request import NAME, check_name
from agentmem.errors import BadRequest
from agentmem.server.bodies import ChatBody

DEFAULT = "default"
SESSION_KEYS = ("session_id", "thread_id", "conversation_id")


class Identity(NamedTuple):
    """An agent, one of its sessions, and the field or header that named it."""

    agent: str
    session: str
    namespace: str
    source: str


class Harness(NamedTuple):
    """A coding harness that names its conversations by itself. `branch` is the header of a subagent's id."""

    name: str
    conversations: tuple[str, ...]
    branch: str | None = None


HARNESSES = (
    Harness("claude-code", ("x-claude-code-session-id",), "x-claude-code-agent-id"),
    Harness("codex", ("thread-id", "session-id")),
    Harness("opencode", ("x-session-id",)),
    Harness("open-webui", ("x-openwebui-chat-id",)),
)


def resolve(headers: Mapping[str, str], body: ChatBody) -> Identity:
    """Who speaks in this request. Raises BadRequest when a name that is explicitly ours is not legal.

    Keys meant for other services (`prompt_cache_key`, `user`, …) never fail: `planner/t-42` is a session of
    an agent, and a key that is no legal name stands for the agent named by its digest.
    """
    fields = body.agentmem
    agent = headers.get("x-agentmem-agent", fields.agent)
    session = headers.get("x-agentmem-session", fields.session)
    namespace = headers.get("x-agentmem-namespace", fields.namespace)
    if agent is not None:
        source = "x-agentmem-agent" if "x-agentmem-agent" in headers else "agentmem"
        found = agent, DEFAULT, source
        check_name(agent)
    else:
        found = _from_client(headers, body)
        if found[2] == "anonymous" and fields.history == "server":
            raise BadRequest("history 'server' needs an agent; name one", param="agentmem.agent")
    return Identity(
        agent=found[0],
        session=found[1] if session is None else check_name(session, "session"),
        namespace=DEFAULT if namespace is None else check_name(namespace, "namespace"),
        source=found[2],
    )


def _from_client(headers: Mapping[str, str], body: ChatBody) -> tuple[str, str, str]:
    """Agent, session and source from what the client sends of its own accord."""
    if body.prompt_cache_key:
        return *_split(body.prompt_cache_key), "prompt_cache_key"
    if harness := _from_harness(headers):
        return harness
    if found := _from_metadata(body.metadata or {}):
        return *found, "metadata"
    for source, key in (("safety_identifier", body.safety_identifier), ("user", body.user)):
        if key:
            return *_split(key), source
    return _anonymous(body), DEFAULT, "anonymous"


def _from_harness(headers: Mapping[str, str]) -> tuple[str, str, str] | None:
    for harness in HARNESSES:
        conversation = next((headers[name] for name in harness.conversations if headers.get(name)), None)
        if conversation:
            branch = headers.get(harness.branch, "") if harness.branch else ""
            session = f"{conversation}:{branch}" if branch else conversation
            return harness.name, _legal(session, "session"), harness.name
    return None


def _from_metadata(metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """`agent_id` or `agent` with a session key; a session key alone names an agent of one session."""
    agent = _first(metadata, ("agent_id", "agent"))
    session = _first(metadata, SESSION_KEYS)
    if agent is None and session is None:
        # Anthropic's clients put JSON into a field that is documented as an opaque user id.
        session = _first(_json_object(metadata.get("user_id")), SESSION_KEYS)
    if agent is None:
        return None if session is None else _split(session)
    name, named_session = _split(agent)
    return name, named_session if session is None else _legal(session, "session")


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((value for name in names if isinstance(value := fields.get(name), str) and value), None)


def _json_object(text: Any) -> Mapping[str, Any]:
    if not isinstance(text, str) or not text.startswith("{"):
        return {}
    try:
        decoded = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _split(key: str) -> tuple[str, str]:
    """A foreign key as agent and session."""
    agent, slash, session = key.partition("/")
    if slash and _is_name(agent) and _is_name(session):
        return agent, session
    return _legal(key, "agent"), DEFAULT


def _legal(key: str, prefix: str) -> str:
    return key if _is_name(key) else f"{prefix}-{_digest(key)}"


def _is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None and ".." not in text


def _anonymous(body: ChatBody) -> str:
    system = [message.content for message in body.messages if message.role in ("system", "developer")]
    return f"anonymous-{_digest(json.dumps([system, body.tools or []]))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
