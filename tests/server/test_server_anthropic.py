"""Anthropic's own client on the daemon: replies, streams, tools, counting, and errors in its shape."""

from __future__ import annotations

import time
from typing import Any

import anthropic
import pytest

STORY = "The lighthouse keeper counts the ships that pass the northern cape every night of the winter. " * 3
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Oslo", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["city", "days"],
    },
}


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def daemon(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_daemon")


@pytest.fixture
def client(daemon) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=daemon.url, api_key=daemon.token, max_retries=0)


def ask(client: anthropic.Anthropic, agent: str, messages: Any, **fields: Any) -> Any:
    headers = {"x-agentmem-agent": agent, "x-agentmem-namespace": f"anthropic-{agent}"}
    return client.messages.create(
        model=fields.pop("model", "default"),
        max_tokens=fields.pop("max_tokens", 8),
        messages=messages,
        extra_headers=headers,
        extra_body={"temperature": 0},
        **fields,
    )


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_a_reply_and_what_it_reused(client) -> None:
    first = ask(client, "reply", [user(STORY)], system="You are brief.")
    assert first.type == "message"
    assert first.content[0].type == "text"
    assert first.stop_reason in ("end_turn", "max_tokens")
    assert first.usage.input_tokens > 0
    assert first.usage.cache_read_input_tokens == 0
    # The next turn sends the same texts as blocks, as Claude Code does.
    blocks = [{"type": "text", "text": STORY, "cache_control": {"type": "ephemeral"}}]
    said = {"role": "assistant", "content": [{"type": "text", "text": first.content[0].text}]}
    system = [{"type": "text", "text": "You are brief."}]
    second = ask(client, "reply", [user(blocks), said, user("And then?")], system=system)
    known = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.cache_read_input_tokens >= known - 2


def test_the_header_that_changes_with_every_request_is_left_out(client) -> None:
    def system(nonce: str) -> list[dict[str, Any]]:
        return [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.30; cch={nonce};\n"},
            {"type": "text", "text": STORY},
        ]

    first = ask(client, "nonce", [user("Go.")], system=system("a1b2c"))
    second = ask(client, "nonce", [user("Go.")], system=system("d3e4f"))
    whole = first.usage.input_tokens
    assert second.usage.cache_read_input_tokens >= whole - 1


def test_a_breakpoint_keeps_the_agent_for_its_time(client, daemon) -> None:
    def kept() -> float | None:
        return daemon.http.get("/v1/agents/marked", params={"namespace": "anthropic-marked"}).json()[
            "keep_until"
        ]

    system = [{"type": "text", "text": STORY, "cache_control": {"type": "ephemeral"}}]
    ask(client, "marked", [user("Go.")], system=system, max_tokens=2)
    assert kept() is None
    system[0]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    ask(client, "marked", [user("Go.")], system=system, max_tokens=2)
    assert kept() == pytest.approx(time.time() + 3600, abs=120)


def test_stream_says_the_same(client) -> None:
    whole = ask(client, "whole", [user(STORY)])
    with client.messages.stream(
        model="default", max_tokens=8, messages=[user(STORY)], extra_headers={"x-agentmem-agent": "pieces"},
        extra_body={"temperature": 0},
    ) as stream:  # fmt: skip
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_tool_that_must_be_used_and_its_result(client) -> None:
    fields: Any = {"tools": [WEATHER], "max_tokens": 120}
    choice: Any = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    first = ask(client, "tools", [user(STORY)], tool_choice=choice, **fields)
    assert first.stop_reason == "tool_use"
    calls = [block for block in first.content if block.type == "tool_use"]
    assert calls[0].input["city"] in ("Oslo", "Rome")
    assert calls[0].id.startswith("toolu_")
    said = {"role": "assistant", "content": [block.model_dump() for block in first.content]}
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "Clear."} for call in calls]
    second = ask(client, "tools", [user(STORY), said, user(results)], **fields | {"max_tokens": 4})
    assert second.usage.cache_read_input_tokens >= first.usage.input_tokens + first.usage.output_tokens - 1


def test_a_streamed_tool_use_adds_up(client) -> None:
    with client.messages.stream(
        model="default", max_tokens=120, messages=[user(STORY)], tools=[WEATHER], extra_body={"temperature": 0},
        tool_choice={"type": "any", "disable_parallel_tool_use": True}, extra_headers={"x-agentmem-agent": "tool-pieces"},
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1
    assert final.stop_reason == "tool_use"
    assert final.content[0].input["days"] in range(1, 8)


def test_a_stop_sequence_is_named(client) -> None:
    whole = ask(client, "unstopped", [user(STORY)], max_tokens=20).content[0].text
    stop = whole[4:6]
    cut = ask(client, "stops", [user(STORY)], max_tokens=20, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].text == whole[: whole.index(stop)]


def test_counting_is_what_a_turn_reads(client) -> None:
    counted = client.messages.count_tokens(model="claude-sonnet-4-5", messages=[user(STORY)], tools=[WEATHER])
    read = ask(client, "counted", [user(STORY)], tools=[WEATHER], model="claude-sonnet-4-5")
    assert counted.input_tokens == read.usage.input_tokens + read.usage.cache_read_input_tokens


def test_filling_the_memory_says_nothing(client) -> None:
    read = ask(client, "filled", [user(STORY)], max_tokens=0)
    assert (read.content[0].text, read.usage.output_tokens) == ("", 0)
    reply = ask(client, "filled", [user(STORY)])
    assert reply.usage.cache_read_input_tokens >= read.usage.input_tokens - 1


def test_what_only_anthropic_can_do_is_left_out_or_refused(client, daemon) -> None:
    tools: Any = [{"type": "web_search_20250305", "name": "web_search"}, WEATHER]
    assert ask(client, "foreign", [user("Hi.")], tools=tools, max_tokens=2).content
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        ask(client, "foreign", [user([image])])
    with pytest.raises(anthropic.NotFoundError):
        ask(client, "foreign", [user("Hi.")], model="gpt-9")
    stranger = anthropic.Anthropic(base_url=daemon.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        ask(stranger, "foreign", [user("Hi.")])
    for body in ({"messages": []}, {"messages": [user("x")]}, {"messages": [user(7)], "max_tokens": 1}, {}):
        reply = daemon.http.post("/v1/messages", json=body)
        assert reply.status_code == 400
        assert reply.json()["type"] == "error"
        assert reply.json()["error"]["type"] == "invalid_request_error"
