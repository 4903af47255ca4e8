"""Chat text to ids and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agentmem.errors import BadRequest, ModelUnavailable
from agentmem.model.chat import ChatTokenizer
from agentmem.model.loaded import LoadedModel
from agentmem.model.random import byte_tokenizer

SAMPLES = [
    "",
    " ",
    "   three spaces,   and\ttabs\t\t",
    "\n\n\nlines\r\nwindows\n \n",
    'def f(x: int = 10_000) -> str:\n    return f"{x:>{8}}"  # ok\n',
    "🙂👩‍👩‍👧‍👦 flags 🇩🇪🇫🇷 and e\u0301 against é",
    "漢字かな交じり文。한국어 العربية हिन्दी",
    "1234567890 3.14159 1e-5 0xFF 2026-11-21",
    "don't I'll we've THEY'RE",
    "\x00\x07\x7f\u200b\ufeff\U0003ffff\U0010ffff",
]


@pytest.fixture(params=[pytest.param("embedded", marks=pytest.mark.slow), "bytes"], scope="module")
def tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    if request.param == "bytes":
        return byte_tokenizer()
    loaded: LoadedModel = request.getfixturevalue("embedded")
    return loaded.tokenizer


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives_encoding(tokenizer: ChatTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


KNOWN = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\4\6\x13\x14\x16\x1d"
)
"""SmolLM2's vocabulary has no tokens for the bytes 4, 6, 13, 14, 16, 1D, F1 and F2 (hexadecimal)."""


@given(text=st.text(KNOWN, max_size=200))
@settings(deadline=None, max_examples=200)
def test_any_text_survives_encoding(embedded: LoadedModel, text: str) -> None:
    assert embedded.tokenizer.decode(embedded.tokenizer.encode(text)) == text


@given(ids=st.lists(st.integers(0, 49151), max_size=40))
@settings(deadline=None, max_examples=300)
def test_stream_of_any_ids_joins_to_what_the_tokenizer_decodes(embedded: LoadedModel, ids: list[int]) -> None:
    tokenizer = embedded.tokenizer
    stream = tokenizer.detokenizer()
    joined = "".join([stream.add(token) for token in ids]) + stream.finish()
    assert joined == tokenizer.decode(ids)
    assert joined == tokenizer._tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("text", SAMPLES)
def test_stream_never_shows_half_a_character(tokenizer: ChatTokenizer, text: str) -> None:
    stream = tokenizer.detokenizer()
    shown = ""
    for token in tokenizer.encode(text):
        shown += stream.add(token)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_stream_holds_bytes_back_until_the_character_is_whole() -> None:
    stream = byte_tokenizer().detokenizer()
    assert [stream.add(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_stream_that_ends_inside_a_character_shows_the_damage_at_the_end() -> None:
    stream = byte_tokenizer().detokenizer()
    assert stream.add("🙂".encode()[0]) == ""
    assert stream.finish() == "\ufffd"


def test_ids_outside_the_vocabulary_have_no_text(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, 10**9, -1]) == ""


def test_encode_adds_nothing_and_special_text_becomes_its_token(embedded: LoadedModel) -> None:
    tokenizer = embedded.tokenizer
    assert not tokenizer.special.keys() & set(tokenizer.encode("plain text"))
    assert tokenizer.encode("<|im_start|>user<|im_end|>")[0] == 1
    assert tokenizer.encode("<|im_start|>user<|im_end|>")[-1] == 2
    assert [tokenizer.special[token] for token in (0, 1, 2)] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_digits_are_tokens_of_their_own(embedded: LoadedModel) -> None:
    encode = embedded.tokenizer.encode
    assert encode("2026") == [encode(digit)[0] for digit in "2026"]


def test_end_of_turn_ends_a_reply(embedded: LoadedModel) -> None:
    assert {0, 2} == embedded.tokenizer.eos_ids
    assert embedded.tokenizer.vocab_size == 49152


def test_template_is_rendered_with_and_without_the_head_of_a_reply(embedded: LoadedModel) -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    assert embedded.tokenizer.render(turns, generation=False) == text
    assert embedded.tokenizer.render(turns) == text + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "messages",
    [[{"content": "x"}], [{"role": "user", "content": 7}], [{"role": "user", "content": ["part"]}], [7]],
)
def test_messages_that_the_template_cannot_take_are_a_bad_request(
    embedded: LoadedModel, messages: Any
) -> None:
    with pytest.raises(BadRequest, match="chat template") as caught:
        embedded.tokenizer.render(messages)
    assert caught.value.param == "messages"


def test_text_that_is_no_unicode_is_a_bad_request(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        tokenizer.encode("half \ud83d of a pair")


def test_threads_may_share_a_tokenizer(embedded: LoadedModel) -> None:
    tokenizer, texts = embedded.tokenizer, SAMPLES * 40
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: tokenizer.decode(tokenizer.encode(text)), texts)) == texts


def test_refusal_written_in_the_template_reaches_the_caller() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}ok"
    )
    tokenizer = ChatTokenizer(_words(template, decoders.ByteLevel()))
    assert tokenizer.render([{"role": "user", "content": "x"}]) == "ok"
    with pytest.raises(BadRequest, match="no system prompts"):
        tokenizer.render([{"role": "system", "content": "x"}])


def test_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(ModelUnavailable, match="no chat template"):
        ChatTokenizer(_words(None, decoders.ByteLevel()))


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), None])
def test_tokenizer_of_a_kind_that_cannot_be_streamed_is_refused(decoder: Any) -> None:
    with pytest.raises(ModelUnavailable, match="not supported"):
        ChatTokenizer(_words("{{ messages }}", decoder))


def _words(template: str | None, decoder: Any) -> TokenizerWrapper:
    tokenizer = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template))


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())
