"""Who is speaking: the first of several sources that names an agent. It never decides what is reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from agentmem.api.fields import NamedBody
from agentmem.engine.request import NAME, Parent, check_name
from agentmem.errors import BadRequest

DEFAULT = "default"
SESSION_KEYS = ("session_id", "thread_id", "conversation_id")


class Found(NamedTuple):
    """An agent and one of its sessions, what named them, and whose fork the agent is if it is new, the likeliest first."""

    agent: str
    session: str
    source: str
    parents: tuple[Parent, ...] = ()


class Identity(NamedTuple):
    """Who speaks, and within which namespace."""

    agent: str
    session: str
    namespace: str
    source: str
    parents: tuple[Parent, ...] = ()


class Harness(NamedTuple):
    """A coding harness that names its conversations by itself.

    `branch` is the header of a subagent's id and `above` of the one that it was started by; without `branch` a conversation that
    names one `above` is a fork of that.
    """

    name: str
    conversations: tuple[str, ...]
    above: str | None = None
    branch: str | None = None


HARNESSES = (
    Harness(
        "claude-code",
        ("x-claude-code-session-id",),
        "x-claude-code-parent-agent-id",
        "x-claude-code-agent-id",
    ),
    Harness("codex", ("thread-id", "session-id"), "x-codex-parent-thread-id"),
    Harness("opencode", ("x-session-id",), "x-parent-session-id"),
    Harness("open-webui", ("x-openwebui-chat-id",)),
)


def resolve(headers: Mapping[str, str], body: NamedBody, owner: tuple[str, str] | None = None) -> Identity:
    """Who speaks in this request. `owner`: the agent and session of the conversation that it says it continues.

    Keys meant for other services (`prompt_cache_key`, `user`, …) never fail: `planner/t-42` is a session of
    an agent, and a key that is no legal name stands for the agent named by its digest. Raises BadRequest when a name that is
    explicitly ours is not legal.
    """
    fields = body.agentmem
    parent = headers.get("x-agentmem-parent", fields.parent)
    agent = headers.get("x-agentmem-agent", fields.agent)
    session = headers.get("x-agentmem-session", fields.session)
    namespace = headers.get("x-agentmem-namespace", fields.namespace)
    if agent is not None:
        source = "x-agentmem-agent" if "x-agentmem-agent" in headers else "agentmem"
        found = Found(check_name(agent), DEFAULT, source)
    else:
        found = _from_client(headers, body, owner)
        if found.source == "anonymous" and fields.history == "server":
            raise BadRequest("history 'server' needs an agent; name one", param="agentmem.agent")
    return Identity(
        agent=found.agent,
        session=found.session if session is None else check_name(session, "session"),
        namespace=DEFAULT if namespace is None else check_name(namespace, "namespace"),
        source=found.source,
        parents=found.parents if parent is None else (_parent(parent),),
    )


def _parent(text: str) -> Parent:
    """`agent` or `agent/session`."""
    agent, slash, session = text.partition("/")
    return check_name(agent, "parent"), check_name(session, "parent") if slash else None


def _from_client(headers: Mapping[str, str], body: NamedBody, owner: tuple[str, str] | None) -> Found:
    """From what the client sends of its own accord."""
    harness = _from_harness(headers)
    if body.prompt_cache_key:
        if harness is not None and harness.session == _legal(body.prompt_cache_key, "session"):
            return harness  # the key only repeats what the harness says in more detail
        return Found(*_split(body.prompt_cache_key), "prompt_cache_key")
    if harness is not None:
        return harness
    if named := _from_metadata(body.metadata or {}):
        return Found(*named, "metadata")
    if owner is not None:
        return Found(*owner, "conversation")
    for source, key in (("safety_identifier", body.safety_identifier), ("user", body.user)):
        if key:
            return Found(*_split(key), source)
    return Found(f"anonymous-{_digest(json.dumps(body.opening))}", DEFAULT, "anonymous")


def _from_harness(headers: Mapping[str, str]) -> Found | None:
    for harness in HARNESSES:
        conversation = next((headers[name] for name in harness.conversations if headers.get(name)), None)
        if not conversation:
            continue
        session, main = _legal(conversation, "session"), harness.name
        above = headers.get(harness.above, "") if harness.above else ""
        if harness.branch is None:
            if not above:
                return Found(main, session, main)
            forked = (_legal(f"{main}:{above}", main), None)
            return Found(
                _legal(f"{main}:{conversation}", main),
                DEFAULT,
                main,
                (forked, (main, _legal(above, "session"))),
            )
        if branch := headers.get(harness.branch, ""):
            started = ((_legal(f"{main}:{above}", main), session),) if above else ()
            return Found(_legal(f"{main}:{branch}", main), session, main, (*started, (main, session)))
        return Found(main, session, main)
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
