"""Plain completions: a prompt goes on as it stands, in text or token ids."""

from __future__ import annotations

from typing import Any

import pytest

TALE = "Once upon a time a lighthouse keeper counted the ships that passed the northern cape. " * 2


def ask(daemon, agent: str, prompt: Any, **fields: Any) -> Any:
    named = {"agentmem": {"agent": agent, "namespace": f"text-{agent}"}}
    return daemon.openai().completions.create(
        model="default",
        prompt=prompt,
        max_tokens=fields.pop("max_tokens", 6),
        temperature=0,
        extra_body=named,
        **fields,
    )


def test_a_prompt_goes_on_and_is_remembered(daemon) -> None:
    first = ask(daemon, "goes", TALE)
    assert first.object == "text_completion"
    assert first.choices[0].text
    assert first.usage.prompt_tokens == len(
        TALE.encode()
    )  # the tiny model has a token a byte, and no template is there
    again = ask(daemon, "goes", TALE + first.choices[0].text + " And")
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_token_ids_are_the_text_they_stand_for(daemon) -> None:
    by_text, by_ids = ask(daemon, "text", TALE), ask(daemon, "ids", list(TALE.encode()))
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert by_ids.usage.prompt_tokens == by_text.usage.prompt_tokens
    longer = ask(daemon, "ids", [*TALE.encode(), *b"One day"])
    assert longer.usage.prompt_tokens_details.cached_tokens >= by_ids.usage.prompt_tokens


def test_several_prompts_have_a_reply_each(daemon) -> None:
    both = ask(daemon, "both", [TALE, "The end of "], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    alone = ask(daemon, "alone", "The end of ")
    assert both.choices[2].text == alone.choices[0].text
    assert both.usage.prompt_tokens == len(TALE) + len("The end of ")


def test_stream_says_the_same_with_echo_and_usage(daemon) -> None:
    whole = ask(daemon, "whole", TALE, echo=True)
    assert whole.choices[0].text.startswith(TALE)
    chunks = list(ask(daemon, "pieces", TALE, echo=True, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_log_probabilities_are_lists(daemon) -> None:
    found = ask(daemon, "logprobs", TALE, logprobs=2).choices[0]
    assert "".join(found.logprobs.tokens) == found.text
    assert (
        len(found.logprobs.token_logprobs)
        == len(found.logprobs.top_logprobs)
        == len(found.logprobs.text_offset)
    )
    assert all(value <= 0 for value in found.logprobs.token_logprobs)
    assert found.logprobs.text_offset == list(range(len(found.text)))
    chunks = ask(daemon, "logprobs-stream", TALE, logprobs=2, stream=True)
    offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset]
    assert offsets == found.logprobs.text_offset


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, None),
        ({"prompt": [[]]}, None),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, None),
        ({"prompt": "x", "best_of": 3}, None),
        ({"prompt": "x", "echo": True, "logprobs": 1}, None),
        ({"prompt": ["x", "y"], "stream": True}, None),
        ({"prompt": "x", "logprobs": 6}, "logprobs"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_said(daemon, fields: dict[str, Any], param: str | None) -> None:
    reply = daemon.http.post("/v1/completions", json={"user": "bad-text"} | fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["message"]
    if param is not None:
        assert error["param"].startswith(param)
