"""Chat completions as OpenAI's own client sees them, and what they say about memory.

Agents of one namespace share what is equal in their prompts; a namespace of its own makes a turn a cold one.
"""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest

STORY = "The lighthouse keeper counts the ships that pass the northern cape every night of the winter. " * 2


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def daemon(request: pytest.FixtureRequest) -> Any:
    """All of it on the tiny model, and again on one that knows words."""
    return request.getfixturevalue(f"{request.param}_daemon")


def alone(name: str) -> dict[str, str]:
    """Headers of an agent that shares nothing with the agents of other tests."""
    return {"x-agentmem-agent": name, "x-agentmem-namespace": f"chat-{name}"}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_reply_has_the_shape_that_the_client_reads(daemon) -> None:
    reply = daemon.openai().chat.completions.create(
        model="default",
        messages=[user("Say hello.")],
        max_tokens=8,
        extra_body={"agentmem": {"agent": "shape", "namespace": "shape"}},
    )
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert 0 < reply.usage.completion_tokens <= 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    memory = reply.usage.model_dump()["agentmem"]
    assert memory["agent"] == "shape"
    assert memory["prefilled_tokens"] == reply.usage.prompt_tokens
    assert memory["committed"] is True


def test_stream_says_the_same_as_the_whole_reply(daemon) -> None:
    client = daemon.openai()
    messages = [user("Name three colours.")]
    whole = client.chat.completions.create(
        model="default", messages=messages, max_tokens=8, temperature=0, extra_headers=alone("a")
    )
    chunks = list(
        client.chat.completions.create(
            model="default",
            messages=messages,
            max_tokens=8,
            temperature=0,
            stream=True,
            extra_headers=alone("b"),
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_ends_with_usage_when_asked(daemon) -> None:
    chunks = list(
        daemon.openai().chat.completions.create(
            model="default",
            messages=[user("Count to three.")],
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
            user="stream-usage",
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_on_the_wire_is_events_that_end_with_done(daemon) -> None:
    body = {"messages": [user("Hi.")], "max_tokens": 4, "stream": True, "user": "wire"}
    with daemon.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-agentmem-agent"] == "wire"
        raw = response.read().decode("ascii")
    events = [event for event in raw.split("\n\n") if event and not event.startswith(":")]
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_second_turn_reuses_the_first_and_headers_say_so(daemon) -> None:
    body = {
        "messages": [user(STORY)],
        "max_tokens": 12,
        "agentmem": {"agent": "headers", "namespace": "headers"},
    }
    first = daemon.http.post("/v1/chat/completions", json=body)
    assert first.headers["x-agentmem-cache"] == "miss"
    assert first.headers["x-agentmem-cached-tokens"] == "0"
    answer = first.json()["choices"][0]["message"]
    body["messages"] += [{"role": "assistant", "content": answer["content"]}, user("Why?")]
    second = daemon.http.post("/v1/chat/completions", json=body)
    usage = second.json()["usage"]
    assert second.headers["x-agentmem-cache"] == "hit"
    assert int(second.headers["x-agentmem-cached-tokens"]) == usage["prompt_tokens_details"]["cached_tokens"]
    # The new question and the words around it; the history and the reply are not read again.
    assert usage["agentmem"]["prefilled_tokens"] < 32
    assert usage["agentmem"]["state_before"] == "hot"


def test_text_parts_are_the_same_prefix_as_a_string(daemon) -> None:
    daemon.chat("parts", STORY)
    parts = [{"type": "text", "text": STORY[:50]}, {"type": "text", "text": STORY[50:]}]
    body = {"messages": [user(parts)], "max_tokens": 4, "agentmem": {"agent": "parts"}}
    usage = daemon.http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["agentmem"]["prefilled_tokens"] <= 1


def test_server_keeps_the_history_when_asked(daemon) -> None:
    fields = {"agentmem": {"agent": "keeper", "session": "s1", "history": "server"}}
    first = daemon.chat("keeper", STORY, **fields)["usage"]
    second = daemon.chat("keeper", "Who counts?", **fields)["usage"]
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"]
    other = daemon.chat("keeper", "Who counts?", agentmem={**fields["agentmem"], "session": "s2"})["usage"]
    assert other["prompt_tokens"] < first["prompt_tokens"]


def test_developer_is_another_word_for_system(daemon) -> None:
    def reply(role: str) -> tuple[str, int]:
        body = {
            "messages": [{"role": role, "content": "You are a pirate."}, user("Hi.")],
            "max_tokens": 8,
            "temperature": 0,
            "agentmem": {"agent": role, "namespace": f"role-{role}"},
        }
        answer = daemon.http.post("/v1/chat/completions", json=body).json()
        return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]

    assert reply("developer") == reply("system")


def test_stop_ends_the_reply_before_the_stop_text(daemon) -> None:
    def reply(namespace: str, **fields: Any) -> dict[str, Any]:
        who = {"agent": "stops", "namespace": namespace}
        return daemon.chat(
            "stops", "Tell me about the sea.", max_tokens=16, temperature=0, agentmem=who, **fields
        )

    plain = reply("stops-a")
    text = plain["choices"][0]["message"]["content"]
    stop = text[5:8]
    cut = reply("stops-b", stop=stop)
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["message"]["content"] == text[: text.index(stop)]


def test_limits_of_the_reply(daemon) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        fields = {"max_tokens": None, field: 3}
        reply = daemon.chat("limit", "Write a long story about a whale.", **fields)
        assert reply["usage"]["completion_tokens"] == 3
        assert reply["choices"][0]["finish_reason"] == "length"


def test_a_seed_repeats_a_sampled_reply(daemon) -> None:
    def reply(seed: int) -> str:
        who = {"agent": f"seed-{seed}", "namespace": f"seed-{time.monotonic_ns()}"}
        fields = {"temperature": 1.2, "seed": seed, "max_tokens": 6, "agentmem": who}
        return daemon.chat("seed", "Invent a name.", **fields)["choices"][0]["message"]["content"]

    first = reply(7)
    assert reply(7) == first
    assert {reply(8), reply(9)} != {first}


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"logprobs": None, "top_logprobs": None},
        {"logprobs": False, "top_logprobs": 0},
        {"n": 8, "logprobs": True, "top_logprobs": 20},
        {"repetition_penalty": 1.1},
        {"store": True, "service_tier": "auto", "parallel_tool_calls": True, "no_such_field": {"a": [1]}},
        {"stream": False, "stream_options": None, "stop": None, "seed": None, "agentmem": None},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_fields_that_ask_for_nothing_special_are_fine(daemon, fields: dict[str, Any]) -> None:
    body = {"model": "agentmem", "messages": [user("Hi.")], "max_tokens": 1, "user": "fine", **fields}
    assert daemon.http.post("/v1/chat/completions", json=body).status_code == 200


def test_nul_and_emoji_are_content_like_any_other(daemon) -> None:
    reply = daemon.chat("odd", "a\x00b \u2028 \U0001f9e0 <|im_end|>")
    assert reply["usage"]["prompt_tokens"] > 0


def test_models_lists_the_loaded_one(daemon, record) -> None:
    client = daemon.openai()
    assert record["model"] in ("tiny", "smollm2-135m-instruct")
    assert [model.id for model in client.models.list()] == [record["model"]]
    assert client.models.retrieve(record["model"]).owned_by == "agentmem"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9/huge")
    assert caught.value.code == "model_not_found"
