"""Which field or header names the agent, in which order, and what becomes of odd keys."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from starlette.datastructures import Headers

from agentmem.api.chat_body import ChatBody
from agentmem.api.identity import resolve
from agentmem.errors import BadRequest


def who(headers: dict[str, str] | None = None, **fields: Any) -> tuple[str, str, str]:
    messages = fields.pop("messages", [{"role": "user", "content": "x"}])
    found = resolve(Headers(headers or {}), ChatBody.model_validate({"messages": messages, **fields}))
    return found.agent, found.session, found.source


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Strongest first: each names an agent of its own, and must win over all that follow.
ORDER: list[tuple[str, dict[str, str], dict[str, Any], str]] = [
    ("x-agentmem-agent", {"X-AgentMem-Agent": "header"}, {}, "header"),
    ("agentmem", {}, {"agentmem": {"agent": "body"}}, "body"),
    ("prompt_cache_key", {}, {"prompt_cache_key": "key"}, "key"),
    ("claude-code", {"x-claude-code-session-id": "s"}, {}, "claude-code"),
    ("metadata", {}, {"metadata": {"agent_id": "meta"}}, "meta"),
    ("safety_identifier", {}, {"safety_identifier": "safe"}, "safe"),
    ("user", {}, {"user": "ada"}, "ada"),
]


@pytest.mark.parametrize("first", range(len(ORDER)), ids=[row[0] for row in ORDER])
def test_the_stronger_source_wins(first: int) -> None:
    headers: dict[str, str] = {}
    fields: dict[str, Any] = {}
    for _, more_headers, more_fields, _ in ORDER[first:]:
        headers |= more_headers
        fields |= more_fields
    source, _, _, agent = ORDER[first]
    assert who(headers, **fields)[::2] == (agent, source)


@pytest.mark.parametrize(
    ("key", "agent", "session"),
    [
        ("planner", "planner", "default"),
        ("planner/t-42", "planner", "t-42"),
        ("crew/planner/7", f"agent-{digest('crew/planner/7')}", "default"),
        ("../etc", f"agent-{digest('../etc')}", "default"),
        ("a/..", f"agent-{digest('a/..')}", "default"),
        ("käse", f"agent-{digest('käse')}", "default"),
        ("x" * 300, f"agent-{digest('x' * 300)}", "default"),
    ],
)
@pytest.mark.parametrize("field", ["prompt_cache_key", "user", "safety_identifier"])
def test_foreign_keys_always_name_somebody(field: str, key: str, agent: str, session: str) -> None:
    assert who(**{field: key}) == (agent, session, field)


def test_session_can_be_named_apart() -> None:
    assert who({"x-agentmem-session": "s2"}, prompt_cache_key="planner/t-42")[:2] == ("planner", "s2")
    assert who(agentmem={"session": "s3"}, user="ada")[:2] == ("ada", "s3")


@pytest.mark.parametrize(
    ("headers", "agent", "session"),
    [
        ({"x-claude-code-session-id": "c1"}, "claude-code", "c1"),
        ({"x-claude-code-session-id": "c1", "x-claude-code-agent-id": "sub"}, "claude-code:sub", "c1"),
        ({"thread-id": "t2", "x-codex-parent-thread-id": "t1"}, "codex:t2", "default"),
        ({"x-session-id": "ses_2", "x-parent-session-id": "ses_1"}, "opencode:ses_2", "default"),
        ({"session-id": "s1", "thread-id": "t1"}, "codex", "t1"),
        ({"x-session-id": "ses_1", "x-session-affinity": "ses_1"}, "opencode", "ses_1"),
        ({"X-OpenWebUI-Chat-Id": "w1"}, "open-webui", "w1"),
        ({"x-session-id": "a/b"}, "opencode", f"session-{digest('a/b')}"),
    ],
)
def test_known_harnesses(headers: dict[str, str], agent: str, session: str) -> None:
    assert who(headers) == (agent, session, agent.partition(":")[0])


@pytest.mark.parametrize(
    ("metadata", "agent", "session"),
    [
        ({"agent_id": "a", "session_id": "s"}, "a", "s"),
        ({"agent": "a/s1"}, "a", "s1"),
        ({"agent": "a", "thread_id": "t"}, "a", "t"),
        ({"conversation_id": "c"}, "c", "default"),
        ({"user_id": '{"session_id": "from-json"}'}, "from-json", "default"),
    ],
)
def test_metadata(metadata: dict[str, Any], agent: str, session: str) -> None:
    assert who(metadata=metadata) == (agent, session, "metadata")


@pytest.mark.parametrize(
    "metadata", [{}, {"agent": 5}, {"user_id": "{broken"}, {"user_id": "[1]"}, {"x": "y"}]
)
def test_metadata_that_names_nobody(metadata: dict[str, Any]) -> None:
    assert who(metadata=metadata, user="ada") == ("ada", "default", "user")


def test_nobody_named_is_an_agent_per_system_prompt() -> None:
    pirate = [{"role": "system", "content": "Be a pirate."}, {"role": "user", "content": "hi"}]
    same = [{"role": "developer", "content": "Be a pirate."}, {"role": "user", "content": "ahoy"}]
    other = [{"role": "system", "content": "Be a monk."}, {"role": "user", "content": "hi"}]
    assert who(messages=pirate) == who(messages=same)
    assert who(messages=pirate)[0] != who(messages=other)[0]
    assert who(messages=pirate)[2] == "anonymous"


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "é", "x" * 129])
def test_our_own_names_are_strict(name: str) -> None:
    for headers, fields in (
        ({"x-agentmem-agent": name}, {}),
        ({}, {"agentmem": {"agent": name}}),
        ({"x-agentmem-session": name}, {"user": "ada"}),
        ({"x-agentmem-namespace": name}, {"user": "ada"}),
    ):
        with pytest.raises(BadRequest):
            who(headers, **fields)


def test_daemon_shows_the_agent_it_found(daemon) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 1,
        "prompt_cache_key": "finder/t-1",
    }
    response = daemon.http.post("/v1/chat/completions", json=body)
    assert response.headers["x-agentmem-agent"] == "finder"
    assert response.headers["x-agentmem-session"] == "t-1"
    assert daemon.http.get("/v1/agents/finder").json()["sessions"] == ["t-1"]
