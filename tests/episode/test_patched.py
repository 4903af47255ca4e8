"""The patched prompt: an instruction, the head of a reply, and the segments that stand for a topic."""

from __future__ import annotations

import pytest

from agentmem.episode.patched import INSTRUCTION, patched_prompt
from agentmem.episode.segment import Segment
from agentmem.model.chat import ChatTokenizer
from agentmem.model.random import random_model


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return random_model("llama", seed=1).tokenizer


def segment(number: int, text: str) -> Segment:
    return Segment(4 * number, 4 * number + 3, text, 0, 0)


HEAD = f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
PARTS = [segment(0, "first"), segment(1, "second"), segment(5, "sixth")]


def test_form(tokenizer: ChatTokenizer) -> None:
    ids = patched_prompt(tokenizer, PARTS)
    assert tokenizer.decode(ids) == f"{HEAD}first\n\nsecond\n\nsixth"
    assert patched_prompt(tokenizer, PARTS[::-1]) == ids
    assert tokenizer.decode(patched_prompt(tokenizer, [])) == HEAD


def test_the_least_central_goes_first_where_there_is_no_room(tokenizer: ChatTokenizer) -> None:
    whole = len(patched_prompt(tokenizer, PARTS))
    near = [0.4, 0.9, 0.7]
    assert len(patched_prompt(tokenizer, PARTS, whole, near)) == whole
    assert tokenizer.decode(patched_prompt(tokenizer, PARTS, whole - 1, near)) == f"{HEAD}second\n\nsixth"
    assert tokenizer.decode(patched_prompt(tokenizer, PARTS, whole - 8, near)) == f"{HEAD}second"
    assert tokenizer.decode(patched_prompt(tokenizer, PARTS, whole - 1)) == f"{HEAD}first\n\nsecond"


def test_the_last_one_is_cut_off(tokenizer: ChatTokenizer) -> None:
    long = [segment(0, "a" * 2000)]
    ids = patched_prompt(tokenizer, long)
    assert len(ids) == 1024
    assert tokenizer.decode(ids).startswith(f"{HEAD}aaa")
