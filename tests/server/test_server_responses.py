"""The Responses API as OpenAI's client uses it: state by id, streams, tools, conversations, and what is left after forgetting."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

STORY = "The lighthouse keeper counts the ships that pass the northern cape every night of the winter. " * 3
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Oslo", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def daemon(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_daemon")


@pytest.fixture
def client(daemon) -> openai.OpenAI:
    return daemon.openai()


def ask(client: openai.OpenAI, agent: str | None, given: Any, **fields: Any) -> Any:
    named = {"agentmem": {"agent": agent, "namespace": "responses"}} if agent else {}
    extra = {"x-agentmem-namespace": "responses"}
    fields = {"max_output_tokens": 6, "temperature": 0, "model": "default"} | fields
    return client.responses.create(input=given, extra_body=named, extra_headers=extra, **fields)


def known(response: Any) -> int:
    return response.usage.input_tokens + response.usage.output_tokens


def test_going_on_by_an_id_needs_only_what_is_new(client) -> None:
    first = ask(client, "chain", STORY, instructions="Be brief.")
    assert first.status in ("completed", "incomplete")
    assert first.output[0].content[0].text == first.output_text
    assert first.usage.input_tokens_details.cached_tokens == 0
    second = ask(client, None, "And then?", previous_response_id=first.id, instructions="Be brief.")
    assert second.usage.input_tokens_details.cached_tokens >= known(first) - 2
    assert second.usage.model_dump()["agentmem"]["agent"] == "chain"
    # From the first one again: a branch.
    other = ask(client, None, "Or then?", previous_response_id=first.id, instructions="Be brief.")
    assert other.usage.input_tokens < second.usage.input_tokens + known(first)
    assert other.previous_response_id == first.id


@pytest.mark.slow
def test_a_chain_survives_a_restart(start, tmp_path) -> None:
    daemon = start(tmp_path / "home")
    first = ask(daemon.openai(), None, STORY)
    daemon.stop()
    daemon = start(tmp_path / "home")
    second = ask(daemon.openai(), None, "And then?", previous_response_id=first.id)
    assert second.usage.input_tokens_details.cached_tokens >= known(first) - 2
    assert (
        daemon.openai().responses.retrieve(first.id, extra_headers={"x-agentmem-namespace": "responses"}).id
        == first.id
    )
    daemon.stop()


def test_stream_says_the_same_in_numbered_events(client) -> None:
    whole = ask(client, "whole", STORY)
    events = list(ask(client, "pieces", STORY, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    final = events[-1].response
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_output_goes_on(client, stream: bool) -> None:
    fields: Any = {"tools": [WEATHER], "max_output_tokens": 120, "parallel_tool_calls": False}
    agent = f"tools-{stream}"
    first = ask(client, agent, STORY, tool_choice="required", stream=stream, **fields)
    if stream:
        events = list(first)
        said = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        first = events[-1].response
        assert said == first.output[0].arguments
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Clear."}
    second = ask(client, None, [output], previous_response_id=first.id, **fields | {"max_output_tokens": 4})
    assert second.usage.input_tokens_details.cached_tokens >= known(first) - 2


def test_a_named_function_and_a_schema(client) -> None:
    call = ask(
        client, "named", STORY, tools=[WEATHER], tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=120, parallel_tool_calls=False,
    ).output[0]  # fmt: skip
    assert call.name == "get_weather"
    schema = {
        "type": "object",
        "properties": {"sky": {"enum": ["clear"]}},
        "required": ["sky"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "sky", "schema": schema}}
    assert json.loads(ask(client, "schema", STORY, text=form, max_output_tokens=60).output_text) == {
        "sky": "clear"
    }


def test_a_conversation_collects_what_is_said_in_it(client) -> None:
    options: Any = {"extra_headers": {"x-agentmem-namespace": "responses"}}
    told = {"type": "message", "role": "user", "content": STORY}
    conversation = client.conversations.create(items=[told], metadata={"topic": "sea"}, **options)
    first = ask(client, None, "How many?", conversation=conversation.id)
    second = ask(client, None, "And then?", conversation=conversation.id)
    assert second.usage.input_tokens_details.cached_tokens >= known(first) - 2
    assert second.conversation.id == conversation.id
    items = list(client.conversations.items.list(conversation.id, order="asc", **options))
    assert [item.role for item in items] == ["user", "user", "assistant", "user", "assistant"]
    client.conversations.items.delete(items[0].id, conversation_id=conversation.id, **options)
    client.conversations.update(conversation.id, metadata={"topic": "ships"}, **options)
    assert client.conversations.retrieve(conversation.id, **options).metadata == {"topic": "ships"}
    assert client.conversations.delete(conversation.id, **options).deleted
    with pytest.raises(openai.NotFoundError):
        ask(client, None, "Still there?", conversation=conversation.id)


def test_what_was_given_can_be_read_and_deleted(client) -> None:
    options: Any = {"extra_headers": {"x-agentmem-namespace": "responses"}}
    first = ask(client, "read", STORY)
    listed = client.responses.input_items.list(first.id, **options)
    assert [part.text for item in listed for part in item.content] == [STORY]
    client.responses.delete(first.id, **options)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id, **options)
    with pytest.raises(openai.NotFoundError):
        ask(client, None, "And?", previous_response_id=first.id)
    unkept = ask(client, "read", STORY, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id, **options)


def test_a_miss_is_diagnosed_against_another_response(client) -> None:
    def compared(given: Any, first: Any, **fields: Any) -> Any:
        options = {"comparison_response_id": first}
        return ask(
            client, "diagnosed", given, prompt_cache_options=options, **fields
        ).prompt_cache_diagnostics

    first = ask(client, "diagnosed", STORY, instructions="Be brief.")
    assert compared(STORY + " Go on.", first.id, instructions="Be brief.").type in ("cache_hit", "cache_miss")
    assert compared(STORY, first.id, instructions="Be brief.").type == "cache_hit"
    changed = compared(STORY, first.id, instructions="Be long.")
    assert (changed.type, changed.reason) == ("cache_miss", "input_changed")
    assert changed.cache_missed_tokens > 0
    assert changed.comparison_reusable_tokens == first.usage.input_tokens
    tools = compared(STORY, first.id, instructions="Be brief.", tools=[WEATHER])
    assert tools.reason == "tools_changed"
    assert compared(STORY, "resp_none").type == "comparison_response_not_found"


def test_forgetting_an_agent_takes_its_responses_along(client, daemon) -> None:
    first = ask(client, "gone", STORY)
    assert daemon.http.delete("/v1/agents/gone", params={"namespace": "responses"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(client, None, "And?", previous_response_id=first.id)
    assert STORY.encode() not in (daemon.home / "responses.db").read_bytes()


def test_no_other_namespace_can_go_on_from_it(client) -> None:
    first = ask(client, "apart", STORY)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="default", input="And?", previous_response_id=first.id)


def test_an_agent_that_leaves_nothing_on_disk_keeps_its_words_in_ram(client, daemon) -> None:
    secret = "the seventh bell rings under the harbour " * 4
    named = {"agentmem": {"agent": "ram", "namespace": "responses", "persist": False}}
    first = client.responses.create(model="default", input=secret, extra_body=named, max_output_tokens=4)
    second = ask(client, None, "And?", previous_response_id=first.id)
    assert second.usage.input_tokens_details.cached_tokens > 0
    for path in daemon.home.glob("responses.db*"):
        assert secret.encode() not in path.read_bytes()


def test_what_is_taken_out_of_a_conversation_is_gone_from_ram_too(client, daemon) -> None:
    named = {"agentmem": {"agent": "half", "persist": False}}
    talk = client.conversations.create(items=[{"role": "user", "content": "Written before."}])

    def texts() -> list[str]:
        items = client.conversations.items.list(talk.id, order="asc").data
        return [part.text for item in items for part in item.content]

    def ask_in_ram(text: str) -> None:
        client.responses.create(
            model="default", input=text, conversation=talk.id, extra_body=named, max_output_tokens=4
        )

    ask_in_ram("Asked in RAM.")
    found = client.conversations.items.list(talk.id, order="asc").data
    assert texts()[:2] == ["Written before.", "Asked in RAM."]
    client.conversations.items.delete(found[1].id, conversation_id=talk.id)
    assert len(texts()) == 2
    assert daemon.http.delete("/v1/agents/half").status_code == 200
    assert texts() == ["Written before."]
    ask_in_ram("Asked once more.")
    client.conversations.delete(talk.id)
    with pytest.raises(openai.NotFoundError):
        texts()


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": [{"type": "image_generation_call"}]}, 400, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, 400, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input.0"),
        ({"input": "x", "background": True}, 400, "background"),
        ({"input": "x", "previous_response_id": "resp_none"}, 404, "previous_response_id"),
        ({"input": "x", "conversation": "conv_none"}, 404, "conversation"),
        ({"input": "x", "conversation": "c", "previous_response_id": "r"}, 400, "previous_response_id"),
        ({"input": "x", "max_output_tokens": -1}, 400, "max_output_tokens"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, 400, "text.format"),
        ({"input": "x", "tool_choice": "required"}, 400, "tool_choice"),
    ],
)
def test_what_cannot_be_done_is_said(daemon, fields: dict[str, Any], status: int, param: str) -> None:
    reply = daemon.http.post("/v1/responses", json={"user": "bad-responses"} | fields)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param
