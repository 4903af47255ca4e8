"""What a prompt is cut into: contents of messages, known texts within them, declared slots."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.compose.declared import check, cut
from agentmem.compose.recognise import (
    BORDER,
    FIXED,
    SHORTEST,
    Part,
    Span,
    Texts,
    chain,
    parts_of,
    spans_of,
)
from agentmem.compose.segment import text_hash
from agentmem.errors import BadRequest
from agentmem.home import default_home
from agentmem.model.chat import ChatTokenizer
from agentmem.model.loaded import load
from agentmem.model.random import byte_tokenizer

ANSWER = "There are nine barrels in the cellar, less one that leaked."
QUESTION = "How much oil is left in the tank after the storm?"
CHAT = [
    {"role": "system", "content": "You keep the light."},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": f"  {QUESTION}\n"},
]


def ids_of(text: str) -> np.ndarray:
    return np.array(byte_tokenizer().encode(text), np.int32)


def known(*texts: str, kind: str = "assistant") -> Texts:
    out = Texts()
    for text in texts:
        out.add(text_hash(ids_of(text)), ids_of(text), kind)
    return out


def said(text: str, parts: list[Part]) -> list[tuple[str, str]]:
    """Each part with its words, of a prompt of one token a byte."""
    return [(p.kind, text[p.start : p.stop]) for p in parts]


@pytest.fixture(scope="module")
def embedded_tokenizer() -> ChatTokenizer:
    return load("embedded", default_home()).tokenizer


def test_contents_are_found_and_not_the_names_of_roles() -> None:
    tokenizer = byte_tokenizer()
    text = tokenizer.render(CHAT)
    spans = spans_of(CHAT, tokenizer.encode(text), tokenizer)
    assert [s.kind for s in spans] == ["system", "user", "assistant", "user"]
    rendered = text.replace("<|im_start|>", "\0").replace("<|im_end|>", "\1")  # one token, one character
    assert [rendered[s.start : s.stop] for s in spans] == [m["content"] for m in CHAT]


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[INST] {{ m['content'] | trim }} [/INST]{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}",
    ],
)
def test_any_template_will_do(template: str, embedded_tokenizer: ChatTokenizer) -> None:
    """What a template trims or leaves out costs that message's span; tokens that lie across an edge are in no span."""
    wrapped: Any = embedded_tokenizer._tokenizer
    before, wrapped.chat_template = wrapped.chat_template, template
    try:
        text = embedded_tokenizer.render(CHAT)
    finally:
        wrapped.chat_template = before
    ids = embedded_tokenizer.encode(text)
    spans = spans_of(CHAT, ids, embedded_tokenizer)
    assert spans
    for span in spans:
        got = embedded_tokenizer.decode(ids[span.start : span.stop])
        assert any(got.strip() in m["content"] for m in CHAT)
    last = embedded_tokenizer.decode(
        ids[spans[-1].start - spans[-1].before : spans[-1].stop + spans[-1].after]
    )
    assert QUESTION in last


def test_messages_without_text_have_no_span() -> None:
    tokenizer = byte_tokenizer()
    chat = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "  "},
        {"role": "user", "content": "hi"},
    ]
    spans = spans_of(
        [*chat, {"role": "assistant", "content": None}], tokenizer.encode(tokenizer.render(chat)), tokenizer
    )
    assert [(s.kind, s.stop - s.start) for s in spans] == [("user", 2)]
    parts: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}
    ]
    assert len(spans_of(parts, tokenizer.encode(tokenizer.render(chat)), tokenizer)) == 1


def test_known_texts_are_found_inside_a_message() -> None:
    text = f"#Question: {QUESTION}\nDraft: {ANSWER}#"
    spans = [Span(1, len(text) - 1, "user")]
    assert said(text, parts_of(ids_of(text), spans, known(QUESTION, ANSWER))) == [
        (FIXED, "#Question: "),
        ("assistant", QUESTION),
        (FIXED, "\nDraft: "),
        ("assistant", ANSWER),
        (FIXED, "#"),
    ]


def test_a_message_without_known_texts_is_one_slot() -> None:
    text = f"#{QUESTION}#"
    spans = [Span(1, len(text) - 1, "user")]
    wanted = [(FIXED, "#"), ("user", QUESTION), (FIXED, "#")]
    assert said(text, parts_of(ids_of(text), spans, Texts())) == wanted
    assert said(text, parts_of(ids_of(text), spans, known("How much oil?"))) == wanted, (
        "too short to be looked for"
    )


def test_a_short_text_is_known_as_a_whole_message() -> None:
    ids = ids_of("#Yes.#")
    (_, part, _) = parts_of(ids, [Span(1, 5, "user")], known("Yes."))
    assert (part.text, part.kind) == (text_hash(ids_of("Yes.")), "user")


def test_system_prompts_are_fixed_but_for_documents_in_them() -> None:
    text = f"#Read this: {ANSWER} That is all.#"
    spans = [Span(1, len(text) - 1, "system")]
    assert said(text, parts_of(ids_of(text), spans, Texts())) == [(FIXED, text)]
    parts = parts_of(ids_of(text), spans, known(ANSWER, kind="document:log"))
    assert [p.kind for p in parts] == [FIXED, "document:log", FIXED]


def test_the_longest_match_wins_and_none_lies_across_messages() -> None:
    text = f"#{QUESTION} {ANSWER}#{ANSWER}#"
    edge = 1 + len(QUESTION) + 1 + len(ANSWER)
    spans = [Span(1, edge, "user"), Span(edge + 1, len(text) - 1, "user")]
    across = f"{ANSWER}#{ANSWER}"
    parts = parts_of(ids_of(text), spans, known(QUESTION[:30], f"{QUESTION} {ANSWER[:20]}", across, ANSWER))
    assert [w for kind, w in said(text, parts) if kind != FIXED] == [f"{QUESTION} {ANSWER[:20]}", ANSWER]


def test_the_tokens_at_a_text_s_ends_may_differ() -> None:
    """They merge with their neighbours; the one that a text has merged with is a border, and no part of a template."""
    text = f"#Draft: {ANSWER}#"
    ids, start = ids_of(text), text.index(ANSWER)
    ids[start], ids[start + len(ANSWER) - 1] = 300, 301
    parts = parts_of(ids, [Span(1, len(text) - 1, "user")], known(ANSWER))
    assert [(p.kind, p.stop - p.start) for p in parts] == [
        (FIXED, 8), (BORDER, 1), ("assistant", len(ANSWER) - 2), (BORDER, 1), (FIXED, 1),
    ]  # fmt: skip
    assert parts[2].at == 1
    other = ids.copy()
    other[start] = 302
    again = parts_of(other, [Span(1, len(text) - 1, "user")], known(ANSWER))
    assert chain(other, again)[-1] == chain(ids, parts)[-1]


@pytest.mark.slow
def test_a_real_tokenizer_s_texts_are_found_inside_a_sentence(embedded_tokenizer: ChatTokenizer) -> None:
    texts, encode = Texts(), embedded_tokenizer.encode
    answer = f"{ANSWER} Nobody has counted the cans, though they are heavy"
    own = np.array(encode(answer), np.int32)
    assert len(own) >= SHORTEST
    texts.add(text_hash(own), own, "assistant")
    for prompt in (f"Draft: {answer}\nCheck.", f"({answer}ish)", f"\n\n{answer}"):
        ids = np.array(encode(prompt), np.int32)
        (match,) = texts.find(ids, [Span(0, len(ids), "user")])
        assert match.stop - match.start >= len(own) - 2
        assert embedded_tokenizer.decode(ids[match.start : match.stop].tolist()) in answer


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_parts_are_the_whole_prompt_and_alternate(data: st.DataObject) -> None:
    letters = st.integers(0, 2)
    texts, pool = Texts(), []
    for _ in range(data.draw(st.integers(0, 4))):
        ids = np.array(data.draw(st.lists(letters, min_size=1, max_size=40)), np.int32)
        texts.add(text_hash(ids), ids, "assistant")
        pool.append(ids)
    pieces = data.draw(st.lists(st.sampled_from([np.array([7, 8], np.int32), *pool]), min_size=1, max_size=8))
    ids = np.concatenate(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    spans = [
        Span(a, b, data.draw(st.sampled_from(["user", "system", "slot:x"])))
        for a, b in zip(cuts[::2], cuts[1::2], strict=False)
    ]
    parts = parts_of(ids, spans, texts)
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(len(ids)))
    kinds = [p.kind for p in parts if p.kind != BORDER]
    assert all((a == FIXED) != (b == FIXED) for a, b in pairwise(kinds))
    assert kinds[0] == FIXED
    assert all(p.text in texts for p in parts if p.text)
    for part in parts:
        if part.text:
            whole = next(t for t in pool if text_hash(t) == part.text)
            assert np.array_equal(whole[part.at : part.at + len(part)], ids[part.start : part.stop])


def test_texts_are_forgotten() -> None:
    texts = known(QUESTION, ANSWER)
    texts.remove(text_hash(ids_of(ANSWER)))
    ids = ids_of(f"{QUESTION}{ANSWER}")
    assert [m.text for m in texts.find(ids, [Span(0, len(ids), "user")])] == [text_hash(ids_of(QUESTION))]


def test_a_long_prompt_is_looked_through_quickly() -> None:
    """Also one that is all alike, with texts that are all alike."""
    texts = Texts()
    for n in range(100, 160):
        ids = np.zeros(n, np.int32)
        texts.add(text_hash(ids), ids, "assistant")
    prompt = np.zeros(20_000, np.int32)
    begun = time.perf_counter()
    assert len(texts.find(prompt, [Span(0, len(prompt), "user")])) > 100
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 50_000, 100_000).astype(np.int32)
    assert texts.find(prompt, [Span(0, len(prompt), "user")]) == []
    assert time.perf_counter() - begun < 2


DECLARED = {"ask": "The question is: {{question}}\nThe solver says: {{solver}}\nCheck this."}


def test_a_declared_template_cuts_a_message_nobody_has_seen() -> None:
    text = f"#The question is: {QUESTION}\nThe solver says: {ANSWER}\nCheck this.#"
    spans = cut(ids_of(text).tolist(), [Span(1, len(text) - 1, "user")], DECLARED, byte_tokenizer())
    assert [(s.kind, text[s.start : s.stop]) for s in spans] == [
        ("slot:question", QUESTION),
        ("slot:solver", ANSWER),
    ]
    assert said(text, parts_of(ids_of(text), spans, Texts()))[1::2] == [
        ("slot:question", QUESTION),
        ("slot:solver", ANSWER),
    ]


def test_a_declared_template_may_be_a_whole_prompt() -> None:
    text = f"You check.|The question is: {QUESTION}|Go on."
    templates = {"whole": "You check.|The question is: {{question}}|Go on.", "half": "{{all}}|Go on."}
    (slot,) = cut(ids_of(text).tolist(), [Span(11, len(text) - 8, "user")], templates, byte_tokenizer())
    assert (slot.kind, text[slot.start : slot.stop]) == ("slot:question", QUESTION), (
        "the one with more fixed text"
    )


def test_another_prompt_is_left_as_it_is() -> None:
    text = f"#The question is: {QUESTION}\nThe analyst says: {ANSWER}\nCheck this.#"
    spans = [Span(1, len(text) - 1, "user")]
    assert cut(ids_of(text).tolist(), spans, DECLARED, byte_tokenizer()) == spans


@pytest.mark.parametrize("text", ["no slot", "{{only}}", "{{a}}{{b}}", "x{{a}} {{b}}"])
def test_templates_that_cut_nothing_are_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        check(text)
