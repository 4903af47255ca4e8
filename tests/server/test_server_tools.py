"""Tools and schemas: what must be a call is one, what must follow a schema does, and calls are remembered as they were said."""

from __future__ import annotations

import json
from typing import Any

import pytest

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"$ref": "#/$defs/City"},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
            "$defs": {"City": {"type": "string", "enum": ["Oslo", "Rome", "Lima"]}},
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
ASKED = "The crew wants to know what the sky over the harbour looks like before it leaves. " * 3


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def daemon(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_daemon")


def ask(daemon, agent: str, messages: list[dict[str, Any]], **fields: Any) -> Any:
    return daemon.openai().chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=fields.pop("max_tokens", 120),
        extra_body={"agentmem": {"agent": agent, "namespace": f"tools-{agent}"}},
        **fields,
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_call_that_must_be_is_one_of_the_schema(daemon) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    reply = ask(
        daemon, "named", [user(ASKED)], tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False
    )
    (chosen,) = reply.choices
    assert chosen.finish_reason == "tool_calls"
    assert chosen.message.content is None
    (call,) = chosen.message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Oslo", "Rome", "Lima")
    assert 1 <= arguments["days"] <= 7
    assert set(arguments) == {"city", "days"}


def test_any_tool_may_be_the_one_that_must_be_called(tiny_daemon) -> None:
    names = set()
    for seed in range(4):
        reply = ask(
            tiny_daemon,
            "any",
            [user(ASKED)],
            tools=[WEATHER, CLOCK],
            tool_choice="required",
            temperature=1.5,
            seed=seed,
        )
        names |= {call.function.name for call in reply.choices[0].message.tool_calls}
    assert names <= {"get_weather", "clock"}
    assert names


def test_several_calls_come_where_several_are_asked_for(tiny_daemon) -> None:
    counts = set()
    for seed, parallel in ((1, True), (2, True), (3, True), (1, False), (2, False)):
        reply = ask(
            tiny_daemon, f"several-calls-{seed}-{parallel}", [user(ASKED)], tools=[CLOCK], tool_choice="required",
            parallel_tool_calls=parallel, temperature=1, seed=seed, max_tokens=300,
        )  # fmt: skip
        counts.add((parallel, len(reply.choices[0].message.tool_calls)))
    assert {number for parallel, number in counts if not parallel} == {1}
    assert max(number for parallel, number in counts if parallel) > 1


def test_stream_brings_the_same_call_in_pieces(daemon) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(daemon, "whole", [user(ASKED)], **fields)
    chunks = list(ask(daemon, "pieces", [user(ASKED)], stream=True, **fields))
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert pieces[0].function.name == "get_weather"
    assert pieces[0].id
    assert len(pieces) > 3
    assert {piece.index for piece in pieces} == {0}
    said = "".join(piece.function.arguments for piece in pieces)
    assert said == whole.choices[0].message.tool_calls[0].function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_the_turn_after_a_call_reuses_the_call_as_it_was_said(daemon) -> None:
    first = ask(
        daemon, "loop", [user(ASKED)], tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    said = first.choices[0].message.model_dump(exclude_none=True)
    # Clients write the arguments down in their own way.
    function = said["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(json.loads(function["arguments"]), indent=2, sort_keys=True)
    answer = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "Clear, 12 degrees."}
    second = ask(daemon, "loop", [user(ASKED), said, answer], tools=[WEATHER], max_tokens=8)
    known = first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= known - 1


def test_tools_that_may_not_be_called_leave_text_alone(daemon) -> None:
    reply = ask(daemon, "silent", [user(ASKED)], tools=[WEATHER], tool_choice="none", max_tokens=8)
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].message.content is not None


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_follows_its_schema(daemon, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {
            "sky": {"enum": ["clear", "grey"]},
            "wind": {"type": "integer", "minimum": 0, "maximum": 12},
        },
        "required": ["sky", "wind"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "report", "schema": schema}}
    reply = ask(daemon, f"schema-{stream}", [user(ASKED)], response_format=wanted, stream=stream)
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        if stream
        else reply.choices[0].message.content
    )
    report = json.loads(text)
    assert report["sky"] in ("clear", "grey")
    assert 0 <= report["wind"] <= 12
    assert len(report) == 2


def test_several_constrained_replies_go_their_own_ways(daemon) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 10**6}},
        "required": ["n"],
    }
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {"name": "number", "schema": schema | {"additionalProperties": False}},
    }
    reply = ask(
        daemon, "several", [user(ASKED)], response_format=wanted, n=4, temperature=1.8, seed=3, max_tokens=40
    )
    found = {json.loads(choice.message.content)["n"] for choice in reply.choices}
    assert len(found) > 1


def test_reading_only_says_nothing_and_is_remembered(daemon) -> None:
    body = {"messages": [user(ASKED)], "agentmem": {"agent": "warmed", "namespace": "tools-warmed"}}
    read = daemon.http.post("/v1/chat/completions", json=body | {"max_tokens": 0}).json()
    assert read["choices"][0]["message"]["content"] == ""
    assert read["usage"]["completion_tokens"] == 0
    again = daemon.http.post("/v1/chat/completions", json=body | {"max_tokens": 4}).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= read["usage"]["prompt_tokens"] - 1
    warmed = body | {"prompt_cache_options": {"prewarm": True}, "messages": [*body["messages"], user("And?")]}  # type: ignore[misc]
    assert daemon.http.post("/v1/chat/completions", json=warmed).json()["usage"]["completion_tokens"] == 0


def test_a_subagent_is_recorded_as_a_fork_of_who_started_it(daemon) -> None:
    main = {"x-claude-code-session-id": "c1", "x-agentmem-namespace": "tools-fork"}
    body = {"messages": [user(ASKED)], "max_tokens": 2}
    assert daemon.http.post("/v1/chat/completions", json=body, headers=main).status_code == 200
    branch = main | {"x-claude-code-agent-id": "sub"}
    reply = daemon.http.post("/v1/chat/completions", json=body, headers=branch).json()
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= reply["usage"]["prompt_tokens"] - 1
    agents = daemon.http.get("/v1/agents", params={"namespace": "tools-fork"}).json()["data"]
    lineage = {agent["agent"]: agent["lineage"] for agent in agents}
    assert lineage["claude-code"] is None
    assert lineage["claude-code:sub"] == {"parent": "claude-code", "session": "c1", "turn": 1}


def test_explain_says_what_changed_where_and_what_that_cost(daemon) -> None:
    def turn(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
        ask(daemon, "why", list(messages), max_tokens=4, **fields)
        return daemon.http.get("/v1/agents/why/explain", params={"namespace": "tools-why"}).json()

    system = {"role": "system", "content": "You watch the sky.\nIt is 20:57 now."}
    assert turn(system, user(ASKED))["reason"] == "new_session"
    later = turn(system | {"content": "You watch the sky.\nIt is 20:59 now."}, user(ASKED))
    assert later["reason"] == "system_changed"
    assert later["diverged"]["message"] == 0
    assert later["diverged"]["line"] == 2
    assert later["diverged"]["before"].endswith("20:57 now.")
    assert later["diverged"]["after"].endswith("20:59 now.")
    assert later["lost_tokens"] > 0
    assert 0 < later["lost_ms"] <= later["prefill_ms"]
    other = turn(system | {"content": "You watch the sky.\nIt is 20:59 now."}, user("Something else."))
    assert other["reason"] == "input_changed"
    assert other["diverged"]["message"] == 1
    told = turn(
        system | {"content": "You watch the sky.\nIt is 20:59 now."}, user("Something else."), tools=[CLOCK]
    )
    assert told["reason"] == "tools_changed"
    where: dict[str, Any] = {"namespace": "tools-why"}
    first = daemon.http.get("/v1/agents/why/explain", params=where | {"turn": 1}).json()
    assert (first["turn"], first["reason"]) == (1, "new_session")
    assert daemon.http.get("/v1/agents/why/explain", params=where | {"turn": 99}).status_code == 404
    assert daemon.http.get("/v1/agents/why/explain", params=where | {"turn": "first"}).status_code == 400


def test_state_is_kept_for_as_long_as_was_asked(daemon) -> None:
    body = {
        "messages": [user(ASKED)],
        "max_tokens": 2,
        "agentmem": {"agent": "kept", "namespace": "tools-kept"},
    }
    options = {"prompt_cache_options": {"ttl": "30m"}}
    reply = daemon.http.post("/v1/chat/completions", json=body | options)
    assert reply.status_code == 200
    info = daemon.http.get("/v1/agents/kept", params={"namespace": "tools-kept"}).json()
    assert info["keep_until"] == pytest.approx(info["last_used"] + 1800, abs=60)
    assert info["pinned"] is False
    bad = daemon.http.post("/v1/chat/completions", json=body | {"prompt_cache_options": {"ttl": "soon"}})
    assert bad.status_code == 400
