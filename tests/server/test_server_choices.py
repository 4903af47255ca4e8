"""Several replies and log probabilities as OpenAI's own client reads them, whole and as a stream."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob

from agentmem.client import AgentMemClient

QUESTION = [{"role": "user", "content": "What does the keeper of the lamp write down?"}]


CLIENTS: dict[str, openai.OpenAI] = {}


def client_of(daemon: Any) -> openai.OpenAI:
    """One client for each daemon: they take longer to make than most replies."""
    if daemon.url not in CLIENTS:
        CLIENTS[daemon.url] = daemon.openai()
    return CLIENTS[daemon.url]


def ask(daemon: Any, name: str, **fields: Any) -> ChatCompletion:
    """One whole answer to an agent that shares nothing with those of other calls."""
    who = {"x-agentmem-agent": name, "x-agentmem-namespace": f"choices-{name}"}
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 5, **fields}
    return client_of(daemon).chat.completions.create(  # type: ignore[call-overload]
        model="default", messages=QUESTION, extra_headers=who, **options
    )


def stream(daemon: Any, name: str, **fields: Any) -> list[ChatCompletionChunk]:
    return list(ask(daemon, name, stream=True, **fields))  # type: ignore[arg-type]


def text(chunks: list[ChatCompletionChunk], index: int) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


def spelled(tokens: list[ChatCompletionTokenLogprob]) -> str:
    """What the bytes of the tokens say; a tiny model also says bytes that are no text."""
    return b"".join(bytes(one.bytes or []) for one in tokens).decode(errors="replace")


def test_n_choices_are_numbered_and_the_usage_counts_them_all(daemon) -> None:
    one, many = ask(daemon, "one"), ask(daemon, "many", n=4)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in many.choices}) == 4
    assert many.choices[0].message.content == one.choices[0].message.content
    assert all(choice.finish_reason in ("stop", "length") for choice in many.choices)
    assert one.usage is not None
    assert many.usage is not None
    assert many.usage.prompt_tokens == one.usage.prompt_tokens
    assert one.usage.completion_tokens < many.usage.completion_tokens <= 4 * 12
    assert many.usage.model_dump()["agentmem"]["prefilled_tokens"] == one.usage.prompt_tokens


def test_a_stream_says_the_same_choices(daemon) -> None:
    whole = ask(daemon, "whole", n=3)
    chunks = stream(daemon, "pieces", n=3, stream_options={"include_usage": True})
    for index, choice in enumerate(whole.choices):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert text(chunks, index) == choice.message.content
        assert own[0].delta.role == "assistant"
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
        assert own[-1].finish_reason == choice.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_next_turn_follows_the_first_choice(daemon) -> None:
    who = {"agent": "heir", "namespace": "heir", "history": "server"}
    first = daemon.chat("heir", "Name a number.", n=3, temperature=1.2, seed=1, max_tokens=8, agentmem=who)
    kept = first["choices"][0]["message"]["content"]
    said = daemon.http.get("/v1/agents/heir/explain", params={"namespace": "heir"}).json()
    assert said
    messages = ["Name a number.", kept, "Another."]
    second = daemon.chat("heir", *messages, agentmem={**who, "history": "client"})["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] > first["usage"]["prompt_tokens"]


@pytest.mark.parametrize("top", [None, 0, 3, 20])
def test_log_probabilities_spell_the_reply(daemon, top: int | None) -> None:
    fields = {} if top is None else {"top_logprobs": top}
    reply = ask(daemon, f"spell-{top}", n=2, logprobs=True, **fields)
    for choice in reply.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content
        assert tokens
        assert spelled(tokens) == choice.message.content
        for one in tokens:
            assert one.logprob <= 0
            assert one.token == bytes(one.bytes or []).decode(errors="replace")
            assert len(one.top_logprobs) == (top or 0)
            ranked = [t.logprob for t in one.top_logprobs]
            assert ranked == sorted(ranked, reverse=True)
            assert sum(map(math.exp, ranked)) <= 1 + 1e-5
    plain = ask(daemon, f"plain-{top}", n=2)
    assert [c.message.content for c in plain.choices] == [c.message.content for c in reply.choices]
    assert [c.logprobs for c in plain.choices] == [None, None]


def test_a_stream_has_the_log_probabilities_of_the_whole_reply(daemon) -> None:
    whole = ask(daemon, "lp-whole", n=2, logprobs=True, top_logprobs=2)
    chunks = stream(daemon, "lp-pieces", n=2, logprobs=True, top_logprobs=2)
    for index, choice in enumerate(whole.choices):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        shown = [one for c in own if c.logprobs for one in c.logprobs.content or []]
        assert choice.logprobs is not None
        assert shown == choice.logprobs.content
        assert text(chunks, index) == choice.message.content
        assert all(c.logprobs is None for c in own if c.finish_reason or c.delta.role)


def test_text_that_waits_for_a_stop_takes_its_log_probabilities_along(daemon) -> None:
    said = ask(daemon, "stop-a").choices[0].message.content
    assert said
    stop = said[5:9]
    chunks = stream(daemon, "stop-b", stop=[stop], logprobs=True)
    assert text(chunks, 0) == said.partition(stop)[0]
    shown = [one for chunk in chunks for c in chunk.choices if c.logprobs for one in c.logprobs.content or []]
    assert spelled(shown) == text(chunks, 0)


def test_our_client_reads_choices_and_log_probabilities(daemon) -> None:
    options: dict[str, Any] = {"n": 2, "max_tokens": 8, "temperature": 1.0, "seed": 3, "logprobs": True}
    with AgentMemClient(home=daemon.home, namespace="ours-a") as client:
        whole = client.chat("ada", "Name a river.", **options)
    with AgentMemClient(home=daemon.home, namespace="ours-b") as client:
        pieces = client.stream_chat("ada", "Name a river.", **options)
        assert "".join(pieces) == whole.text
    assert pieces.result.choices == whole.choices
    assert len(whole.choices) == 2
    assert whole.logprobs
    assert whole.text == whole.choices[0].text != whole.choices[1].text


def test_what_cannot_be_is_told_in_the_clients_own_words(daemon) -> None:
    for fields, param in (
        ({"n": 0}, "n"),
        ({"n": 99}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(daemon, "bad", **fields)
        assert caught.value.param == param
        assert caught.value.code == "invalid_value"


@pytest.mark.slow
def test_on_a_model_that_knows_words(embedded_daemon) -> None:
    """Tokens of several bytes, and characters of several tokens."""
    fields = {"n": 3, "logprobs": True, "top_logprobs": 5, "max_tokens": 24, "temperature": 2.0}
    whole = ask(embedded_daemon, "words", **fields)
    chunks = stream(embedded_daemon, "words-stream", **fields)
    for index, choice in enumerate(whole.choices):
        assert choice.logprobs is not None
        assert spelled(choice.logprobs.content or []) == choice.message.content == text(chunks, index)
