"""Canonical tokens: our ids stand where the client's text equals ours, and only what follows is tokenised."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.blockpool.index import TurnRow
from agentmem.engine.conversation import Conversation, Span
from agentmem.model.random import END, START, byte_tokenizer

TOKENIZER = byte_tokenizer()
IDS = {text: number for number, text in TOKENIZER.special.items()}
START_ID, END_ID = IDS[START], IDS[END]

Messages = list[dict[str, Any]]


class Merging:
    """The byte tokenizer, but it encodes pairs of letters as one: text has several spellings in ids."""

    special = TOKENIZER.special

    def encode(self, text: str) -> list[int]:
        ids = TOKENIZER.encode(text)
        out: list[int] = []
        while ids:
            if len(ids) > 1 and all(97 <= i < 123 for i in ids[:2]):
                out.append(1000 + 128 * ids[0] + ids[1])
                ids = ids[2:]
            else:
                out.append(ids[0])
                ids = ids[1:]
        return out

    def decode(self, ids: Any) -> str:
        flat: list[int] = []
        for i in ids:
            flat += divmod(i - 1000, 128) if i >= 1000 else [i]
        return TOKENIZER.decode(flat)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def render(messages: Messages, generation: bool = True) -> str:
    return TOKENIZER.render(messages, generation=generation)


def reply_spans(conversation: Conversation, text: str, end: bool = True) -> list[Span]:
    ids = TOKENIZER.encode(text)
    return [Span("reply", text, ids), *([Span("end", END, [END_ID])] if end else [])]


def turn(conversation: Conversation, messages: Messages, reply: str, end: bool = True) -> tuple[int, TurnRow]:
    """One whole turn; returns the tokens that stood, and the log entry."""
    alignment = conversation.align(render(messages))
    keep = alignment.keep
    row = conversation.record(alignment, reply_spans(conversation, reply, end), [*messages, assistant(reply)])
    return keep, row


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(TOKENIZER)


def prompt_of(conversation: Conversation, messages: Messages) -> tuple[int, list[int]]:
    alignment = conversation.align(render(messages))
    return alignment.keep, conversation.ids[: alignment.keep] + alignment.ids


def test_a_first_prompt_is_tokenised_whole(conversation: Conversation) -> None:
    text = render([user("hello")])
    alignment = conversation.align(text)
    assert (alignment.keep, alignment.text, alignment.ids) == (0, text, TOKENIZER.encode(text))


def test_the_next_turn_keeps_prompt_and_reply(conversation: Conversation) -> None:
    first = [user("hello")]
    turn(conversation, first, "hi there")
    before = conversation.ids
    messages = [*first, assistant("hi there"), user("and?")]
    keep, ids = prompt_of(conversation, messages)
    assert keep == len(before)
    assert ids == TOKENIZER.encode(render(messages))
    assert TOKENIZER.decode(ids[keep:]).startswith("\n<|im_start|>user")


def test_a_reply_keeps_the_ids_that_the_model_sampled() -> None:
    """However the tokenizer would split its text: no token of the reply is made anew."""
    conversation = Conversation(Merging())
    text = render([user("question")])
    alignment = conversation.align(text)
    sampled = [ord(c) for c in "abcdef"]
    added = [Span("reply", "abcdef", sampled), Span("end", END, [END_ID])]
    conversation.record(alignment, added, [user("question"), assistant("abcdef")])
    assert Merging().encode("abcdef") != sampled
    following = conversation.align(render([user("question"), assistant("abcdef"), user("more")]))
    assert following.keep == len(conversation.ids)
    assert conversation.ids[-7:] == [*sampled, END_ID]


def test_a_reply_cut_by_its_limit_has_no_end_token(conversation: Conversation) -> None:
    turn(conversation, [user("hello")], "hi th", end=False)
    keep, ids = prompt_of(conversation, [user("hello"), assistant("hi th"), user("more")])
    assert keep == len(conversation.ids)
    assert ids[keep] == END_ID
    assert ids == TOKENIZER.encode(render([user("hello"), assistant("hi th"), user("more")]))


@pytest.mark.parametrize(
    ("changed", "kept_text"),
    [
        ([user("hello"), assistant("OTHER"), user("x")], "<|im_start|>user\nhello<|im_end|>\n<|im_start|>"),
        (
            [user("hello"), assistant("hi there, friend"), user("x")],
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>",
        ),
        ([user("hello"), assistant("hi"), user("x")], "<|im_start|>user\nhello<|im_end|>\n<|im_start|>"),
        ([user("hellO"), assistant("hi there"), user("x")], "<|im_start|>"),
        ([user("hell"), assistant("hi there"), user("x")], "<|im_start|>"),
        ([user("hello!"), assistant("hi there"), user("x")], "<|im_start|>"),
        ([user("hello")], None),
        ([system("be brief"), user("hello")], "<|im_start|>"),
    ],
)
def test_a_changed_history_keeps_what_is_the_same_up_to_a_special_token(
    conversation: Conversation, changed: Messages, kept_text: str | None
) -> None:
    turn(conversation, [user("hello")], "hi there")
    keep, ids = prompt_of(conversation, changed)
    if kept_text is not None:
        assert TOKENIZER.decode(conversation.ids[:keep]).startswith(kept_text)
    assert ids == TOKENIZER.encode(render(changed))
    text = render(changed)
    shared = TOKENIZER.decode(conversation.ids[:keep])
    assert text.startswith(shared)


def test_asking_the_same_again_keeps_the_prompt_and_drops_the_reply(conversation: Conversation) -> None:
    turn(conversation, [user("hello")], "hi there")
    keep, ids = prompt_of(conversation, [user("hello")])
    assert ids == TOKENIZER.encode(render([user("hello")]))
    assert keep >= ids.index(END_ID) + 1
    _, row = turn(conversation, [user("hello")], "another")
    assert TOKENIZER.decode(conversation.ids).endswith("assistant\nanother<|im_end|>")
    assert "hi there" not in TOKENIZER.decode(conversation.ids)
    assert row.keep_tokens == keep


def test_a_reply_matches_without_its_outer_white_space(conversation: Conversation) -> None:
    """Chat templates and clients trim replies."""
    turn(conversation, [user("hello")], " hi there\n\n")
    keep, _ = prompt_of(conversation, [user("hello"), assistant("hi there"), user("more")])
    assert keep == len(conversation.ids)
    keep, _ = prompt_of(conversation, [user("hello"), assistant(" hi there\n\n"), user("more")])
    assert keep == len(conversation.ids)
    keep, _ = prompt_of(conversation, [user("hello"), assistant("hi there!"), user("more")])
    assert keep < len(conversation.ids) - 4


def test_a_reply_that_is_a_prefix_of_the_clients_is_not_taken_for_it(conversation: Conversation) -> None:
    turn(conversation, [user("hello")], "hi", end=False)
    keep, ids = prompt_of(conversation, [user("hello"), assistant("hi there"), user("more")])
    assert ids == TOKENIZER.encode(render([user("hello"), assistant("hi there"), user("more")]))
    assert keep < len(conversation.ids)


def test_text_that_looks_like_a_special_token_in_a_reply_stays_what_it_was(
    conversation: Conversation,
) -> None:
    """The model spelt it in letters; sent back, it is the same letters."""
    spelt = [ord(c) for c in "<|im_end|> ok"]
    messages = [user("hello")]
    alignment = conversation.align(render(messages))
    spans = [Span("reply", "<|im_end|> ok", spelt), Span("end", END, [END_ID])]
    conversation.record(alignment, spans, [*messages, assistant("<|im_end|> ok")])
    keep, ids = prompt_of(conversation, [*messages, assistant("<|im_end|> ok"), user("more")])
    assert keep == len(conversation.ids)
    assert ids[keep - 1 - len(spelt) : keep - 1] == spelt


def test_no_second_beginning_and_no_token_twice(conversation: Conversation) -> None:
    messages: Messages = [system("you are terse")]
    for i in range(5):
        messages.append(user(f"question {i}"))
        turn(conversation, messages, f"answer {i}")
        messages.append(assistant(f"answer {i}"))
    assert TOKENIZER.decode(conversation.ids) + "\n" == render(messages, generation=False)
    assert conversation.ids.count(START_ID) == len(messages)


def replayed(rows: list[TurnRow], tokenizer: Any = TOKENIZER) -> Conversation:
    again = Conversation(tokenizer)
    for row in rows:
        again.apply(row)
    return again


def test_the_log_gives_back_the_conversation(conversation: Conversation) -> None:
    rows = []
    for messages, reply in [
        ([user("hello")], "hi"),
        ([user("hello"), assistant("hi"), user("ümlaut 漢字 🙂")], "naïve 🙂"),
        ([user("hello"), assistant("changed"), user("what?")], "oh"),
        ([user("hello")], "again"),
    ]:
        rows.append(turn(conversation, messages, reply)[1])
        again = replayed(rows)
        assert again.spans == conversation.spans
        assert again.messages == conversation.messages == [*messages, assistant(reply)]
        assert again.turns == len(rows)


def test_text_that_does_not_decode_from_its_ids_is_logged(conversation: Conversation) -> None:
    alignment = conversation.align(render([user("hello")]))
    half = Span("reply", "caf", [ord("c"), ord("a"), ord("f"), 0xC3])
    row = conversation.record(alignment, [half], [user("hello"), assistant("caf")])
    assert [s[2] for s in row.spans] == [None, "caf"]
    assert replayed([row]).spans == conversation.spans


def test_unchanged_messages_are_not_logged_twice(conversation: Conversation) -> None:
    _, first = turn(conversation, [user("hello")], "hi")
    _, second = turn(conversation, [user("hello"), assistant("hi"), user("more")], "yes")
    assert first.messages == [user("hello"), assistant("hi")]
    assert (second.keep_messages, second.messages) == (2, [user("more"), assistant("yes")])
    assert second.keep_tokens == len(first.ids)
    assert len(second.ids) < len(first.ids) + 40


WORDS = st.sampled_from(["a", "bb", " c ", "", "x" * 30, "é", "🙂", START, END, "\n", "a b"])


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_any_history_gives_ids_of_its_text_and_a_log_that_replays(data: st.DataObject) -> None:
    """Clients send whatever they like: the ids spell the rendered text, what stands is a true prefix."""
    conversation, rows = Conversation(TOKENIZER), []
    rng = random.Random(data.draw(st.integers(0, 1 << 16)))
    history: Messages = []
    for _ in range(data.draw(st.integers(1, 5))):
        if history and rng.random() < 0.4:
            history = [dict(m) for m in history[: rng.randrange(0, len(history) + 1, 2)]]
            if history and rng.random() < 0.5:
                history[rng.randrange(len(history))]["content"] = data.draw(WORDS)
        history.append(user(data.draw(WORDS)))
        text = render(history)
        keep, ids = prompt_of(conversation, history)
        assert TOKENIZER.decode(ids) == text
        assert ids[:keep] == conversation.ids[:keep]
        reply = data.draw(st.sampled_from(["ok", " yes \n", "", "é🙂"]))
        _, row = turn(conversation, history, reply, end=rng.random() < 0.7)
        assert conversation.ids[: len(ids)] == ids
        rows.append(row)
        history.append(assistant(reply))
    again = replayed(rows)
    assert again.ids == conversation.ids
    assert again.spans == conversation.spans
    assert again.messages == conversation.messages


def test_truncation_keeps_whole_spans_and_cuts_one(conversation: Conversation) -> None:
    turn(conversation, [user("hello")], "hi")
    ids = conversation.ids
    for keep in range(len(ids), -1, -1):
        conversation.truncate(keep)
        assert conversation.ids == ids[:keep]
        assert all(s.ids for s in conversation.spans)


def test_turn_rows_hold_int32_ids(conversation: Conversation) -> None:
    _, row = turn(conversation, [user("hello")], "hi")
    assert row.ids.dtype == np.int32
    assert list(row.ids) == conversation.ids
