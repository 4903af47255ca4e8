"""Utterances and segments: who said what, and which tokens of the log it took."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.episode.segment import segments_of
from agentmem.episode.utterance import Utterance, located, sentences, spoken, utterances_of
from agentmem.model.chat import ChatTokenizer
from agentmem.model.random import random_model

LONG = (
    "Dr. Moss looked at the leaf for a while. It had three holes, e.g. near the stem! Was it a beetle? "
    "1. Wait until evening. Yes. The price was 3.50 in the shop on the corner, they said. "
) * 4


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return random_model("llama", seed=1).tokenizer


def test_long_replies_are_taken_apart_and_others_are_not() -> None:
    short = "Fine. Then we go by train. See you."
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": short},
        {"role": "assistant", "content": LONG},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": [{"type": "text", "text": "42"}]},
    ]
    said = utterances_of(messages)
    assert said[0] == Utterance("User", LONG.strip())
    assert said[1] == Utterance("Assistant", short)
    assert said[-1] == Utterance("Tool", "42")
    parts = [u.text for u in said[2:-1]]
    assert parts[:4] == [
        "Dr. Moss looked at the leaf for a while.",
        "It had three holes, e.g. near the stem!",
        "Was it a beetle?",
        "1. Wait until evening.",
    ]
    assert parts[4] == "The price was 3.50 in the shop on the corner, they said."
    assert len(parts) == 4 * 5


def test_a_text_of_fragments_only_stays_whole() -> None:
    assert sentences("Yes. No. Oh!") == ["Yes. No. Oh!"]
    assert sentences("no border at all") == ["no border at all"]


@given(text=st.text(st.sampled_from("ab. !?\n\u3002\"')1"), max_size=120))
def test_sentences_stand_in_the_text_in_order(text: str) -> None:
    at = 0
    for sentence in sentences(text):
        at = text.index(sentence, at) + len(sentence)


MESSAGES = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.text(st.characters(codec="ascii"), max_size=40)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(turns=MESSAGES, window=st.integers(1, 5))
def test_ranges_partition_the_log(
    tokenizer: ChatTokenizer, turns: list[tuple[str, str]], window: int
) -> None:
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    ids = tokenizer.encode(tokenizer.render(messages, generation=False))
    said = located(utterances_of(messages), ids, tokenizer)
    for parts in (said, segments_of(said, window)):
        at = 0
        for part in parts:
            assert at == part.start <= part.stop
            at = part.stop
        assert at == (len(ids) if parts else 0)
    assert [u.text for u in said] == [text.strip() for _, text in turns if text.strip()]


def test_a_range_holds_the_text_its_header_and_the_end_of_its_turn(tokenizer: ChatTokenizer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "Hello, na\u00efve \U0001f642."},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "not here"},
    ]
    ids = tokenizer.encode(tokenizer.render(messages, generation=False))
    said = located(utterances_of(messages), ids, tokenizer)
    texts = [tokenizer.decode(ids[u.start : u.stop]) for u in said]
    assert texts == [
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nuser<|im_end|>\n",
        "<|im_start|>assistant\nHello, na\u00efve \U0001f642.<|im_end|>\n",
        "<|im_start|>user\nok<|im_end|>\n",
        "<|im_start|>assistant\nnot here<|im_end|>\n",
    ]


def test_an_utterance_that_is_not_in_the_log_has_no_tokens(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("one two")
    said = located(spoken([("A", "one"), ("B", "never said"), ("A", "two")]), ids, tokenizer)
    assert [(u.start, u.stop) for u in said] == [(0, 4), (4, 4), (4, 7)]


def test_segments_are_windows_of_what_was_said() -> None:
    log = spoken([("Ann", "I moved."), ("Bob", "Where to?"), ("Ann", "  "), ("Ann", "The coast.")])
    first, second = segments_of(log, window=2)
    assert first.text == 'Ann said, "I moved."\nBob said, "Where to?"'
    assert (first.first, first.last, second.first, second.last) == (0, 1, 2, 2)
    assert segments_of([]) == []


@settings(max_examples=30)
@given(count=st.integers(0, 20), more=st.integers(0, 8))
def test_whole_segments_stay_when_the_log_grows(count: int, more: int) -> None:
    log = [Utterance("A", str(i), i, i + 1) for i in range(count + more)]
    before, after = segments_of(log[:count]), segments_of(log)
    assert before[: count // 4] == after[: count // 4]
    assert len(after) == -(-len(log) // 4)
