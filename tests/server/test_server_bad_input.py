"""Bad input: a clear 4xx in OpenAI's envelope, the field by its name, and nothing changed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

HELLO = {"role": "user", "content": "hello"}
CALL = {"role": "assistant", "content": None}
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema"}
DEEP: dict[str, Any] = {}
for _ in range(80):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
ROUTE = "/v1/chat/completions"


def check_envelope(
    response: httpx.Response, status: int, code: str, param: str | None = None
) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["code"], error["param"]) == (code, param)
    return error


@pytest.fixture(autouse=True)
def _nothing_changed(daemon):
    def state() -> Any:
        agents = daemon.http.get("/v1/agents").json()["data"]
        return [(a["agent"], a["tokens"], a["turns"], a["disk_bytes"], a["sessions"]) for a in agents]

    before = state()
    yield
    assert state() == before


BAD_FIELDS = [
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": None}, 400, "invalid_value", "messages"),
    ({"messages": "hello"}, 400, "invalid_value", "messages"),
    ({"messages": ["hello"]}, 400, "invalid_value", "messages.0"),
    ({"messages": [{"content": "x"}]}, 400, "missing_required_parameter", "messages.0.role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_value", "messages.0.role"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_value", "messages.0"),
    ({"messages": [{"role": "user", "content": 7}]}, 400, "invalid_value", "messages.0.content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "unsupported_parameter",
        "messages.0.content",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400,
        "invalid_value",
        "messages.0.content",
    ),
    (
        {"messages": [HELLO, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        400,
        "missing_required_parameter",
        "messages.1.tool_calls.0.function",
    ),
    (
        {"messages": [HELLO | {"tool_calls": [{"function": {"name": "f"}}]}]},
        400,
        "invalid_value",
        "messages.0",
    ),
    (
        {"messages": [HELLO, CALL | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        400,
        "invalid_value",
        "messages",
    ),
    ({"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": 10**9 + 1}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": 10**30}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": 1.5}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": "5"}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": True}, 400, "invalid_value", "max_tokens"),
    ({"max_completion_tokens": -3}, 400, "invalid_value", "max_completion_tokens"),
    ({"temperature": -0.1}, 400, "invalid_value", "temperature"),
    ({"temperature": 2.1}, 400, "invalid_value", "temperature"),
    ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
    ({"top_p": 1.5}, 400, "invalid_value", "top_p"),
    ({"top_k": -1}, 400, "invalid_value", "top_k"),
    ({"seed": 2**70}, 400, "invalid_value", "seed"),
    ({"frequency_penalty": 3}, 400, "invalid_value", "frequency_penalty"),
    ({"logit_bias": {"the": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"5": 1000}}, 400, "invalid_value", "logit_bias.5"),
    ({"stop": ["x"] * 17}, 400, "invalid_value", "stop"),
    ({"stop": ["x" * 257]}, 400, "invalid_value", "stop.0"),
    ({"stop": 7}, 400, "invalid_value", "stop"),
    ({"stream": "yes"}, 400, "invalid_value", "stream"),
    ({"n": 0}, 400, "invalid_value", "n"),
    ({"n": -1}, 400, "invalid_value", "n"),
    ({"n": 99}, 400, "invalid_value", "n"),
    ({"n": 1.5}, 400, "invalid_value", "n"),
    ({"n": True}, 400, "invalid_value", "n"),
    ({"repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
    ({"repetition_penalty": "high"}, 400, "invalid_value", "repetition_penalty"),
    ({"tools": [{"type": "function"}]}, 400, "missing_required_parameter", "tools.0.function"),
    (
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        400,
        "invalid_value",
        "tools.0.function.name",
    ),
    ({"tools": [TOOL, TOOL]}, 400, "invalid_value", "tools"),
    ({"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}, 400, "invalid_value", "tool_choice"),
    ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, 400, "invalid_value", "response_format"),
    ({"response_format": {"type": "xml"}}, 400, "invalid_value", "response_format.type"),
    (
        {"response_format": SCHEMA | {"json_schema": {"schema": {"type": "objekt"}}}},
        400,
        "invalid_schema",
        "response_format",
    ),
    (
        {"response_format": SCHEMA | {"json_schema": {"schema": DEEP}}},
        400,
        "invalid_schema",
        "response_format",
    ),
    ({"logprobs": 5}, 400, "invalid_value", "logprobs"),
    ({"logprobs": "yes"}, 400, "invalid_value", "logprobs"),
    ({"logprobs": 5, "top_logprobs": 5}, 400, "invalid_value", "logprobs"),
    ({"top_logprobs": 3}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 3}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": True}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 2.5}, 400, "invalid_value", "top_logprobs"),
    ({"modalities": ["text", "audio"]}, 400, "unsupported_parameter", "modalities"),
    ({"model": "gpt-9"}, 404, "model_not_found", "model"),
    ({"agentmem": {"agent": "a/b"}}, 400, "invalid_value", "agent"),
    ({"agentmem": {"agent": ".."}}, 400, "invalid_value", "agent"),
    ({"agentmem": {"agent": "a..b"}}, 400, "invalid_value", "agent"),
    ({"agentmem": {"agent": "nul\x00"}}, 400, "invalid_value", "agent"),
    ({"agentmem": {"agent": "new\nline"}}, 400, "invalid_value", "agent"),
    ({"agentmem": {"agent": "x" * 10_000}}, 400, "invalid_value", "agent"),
    ({"agentmem": {"agent": ""}}, 400, "invalid_value", "agent"),
    ({"agentmem": {"agent": "a", "session": "../s"}}, 400, "invalid_value", "session"),
    ({"agentmem": {"agent": "a", "namespace": "n s"}}, 400, "invalid_value", "namespace"),
    ({"agentmem": {"agent": "a", "history": "none"}}, 400, "invalid_value", "agentmem.history"),
    ({"agentmem": {"history": "server"}}, 400, "invalid_value", "agentmem.agent"),
    ({"agentmem": {"agent": "a"}, "max_tokens": 10**6}, 400, "context_length_exceeded", "max_tokens"),
    (
        {"messages": [{"role": "user", "content": "word " * 50_000}]},
        400,
        "context_length_exceeded",
        "messages",
    ),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("fields", "status", "code", "param"), BAD_FIELDS, ids=[json.dumps(row[0])[:60] for row in BAD_FIELDS]
)
def test_bad_field(daemon, stream: bool, fields: dict[str, Any], status: int, code: str, param: str) -> None:
    body = {"messages": [HELLO], "stream": stream, **fields}
    response = daemon.http.post(ROUTE, json=body)
    check_envelope(response, status, code, param)
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"", "missing_required_parameter", None),
        (b"{", "invalid_json", None),
        (b"[]", "invalid_value", None),
        (b"null", "invalid_value", None),
        (b"[" * 100_000, "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_value", "messages.0.content"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            "invalid_value",
            "temperature",
        ),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_p": Infinity}', "invalid_value", "top_p"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "invalid_json", None),
    ],
    ids=["empty", "cut", "array", "null", "deep", "not-utf8", "surrogate", "nan", "infinity", "long-number"],
)
def test_bad_json(daemon, raw: bytes, code: str, param: str | None) -> None:
    response = daemon.http.post(ROUTE, content=raw, headers={"content-type": "application/json"})
    check_envelope(response, 400, code, param)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
def test_wrong_content_type(daemon, kind: str) -> None:
    content = json.dumps({"messages": [HELLO]})
    response = daemon.http.post(ROUTE, content=content, headers={"content-type": kind})
    check_envelope(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("verb", ["", "/warm", "/evict", "/append", "/explain"])
@pytest.mark.parametrize("name", ["%2e%2e", "a..b", "%00", "a%20b", "x" * 10_000, "caf%C3%A9"])
def test_bad_agent_in_the_path(daemon, name: str, verb: str) -> None:
    method = "GET" if verb in ("", "/explain") else "POST"
    body = {"json": {"text": "x"}} if verb == "/append" else {}
    response = daemon.http.request(method, f"/v1/agents/{name}{verb}", **body)
    check_envelope(response, 400, "invalid_value", "agent")


def test_encoded_slash_reaches_no_agent(daemon) -> None:
    check_envelope(daemon.http.delete("/v1/agents/a%2F..%2Fb"), 404, "route_not_found")


def test_unknown_agent(daemon) -> None:
    for method, route in (
        ("GET", "/v1/agents/nobody"),
        ("DELETE", "/v1/agents/nobody"),
        ("POST", "/v1/agents/nobody/warm"),
        ("POST", "/v1/agents/nobody/evict"),
        ("GET", "/v1/agents/nobody/explain"),
    ):
        response = daemon.http.request(method, route)
        assert check_envelope(response, 404, "not_found", "agent")["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"text": "a", "messages": [HELLO]}, None),
        ({"messages": []}, "messages"),
        ({"text": "a", "role": "assistant"}, "role"),
        ({"text": "a", "session": "a/b"}, "session"),
    ],
)
def test_bad_append(daemon, body: dict[str, Any], param: str | None) -> None:
    response = daemon.http.post("/v1/agents/appender/append", json=body)
    check_envelope(response, 400, "invalid_value", param)


def test_what_is_out_of_bounds_is_told_the_bounds(daemon) -> None:
    def message(**fields: Any) -> str:
        return daemon.http.post(ROUTE, json={"messages": [HELLO], **fields}).json()["error"]["message"]

    assert "8" in message(n=99)
    assert "20" in message(logprobs=True, top_logprobs=21)
    assert "logprobs: true" in message(top_logprobs=3)


def test_unknown_route_and_wrong_method(daemon) -> None:
    check_envelope(daemon.http.get("/v2/nothing"), 404, "route_not_found")
    response = daemon.http.get(ROUTE)
    check_envelope(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_openai_client_raises_its_own_types(daemon) -> None:
    client = daemon.openai()
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="default", messages=[HELLO], max_tokens=-1)  # type: ignore[list-item]
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=[HELLO])  # type: ignore[list-item]
