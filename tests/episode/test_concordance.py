"""The concordance: how much of a question's words one utterance of each segment has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentmem.episode.concordance import FEWEST, OTHERS, Concordance, concordance_of, stems
from agentmem.episode.segment import segments_of
from agentmem.episode.utterance import Utterance, sentences

TALK = [
    Utterance("Nora", "I put a lock on my garden shed, the code word is lantern."),
    Utterance("Felix", "My dog chewed the leash."),
    Utterance("Nora", "The tomatoes grew."),
    Utterance("Felix", "Slugs ate half of the lettuce in one night."),
    Utterance("Felix", "My garden shed has a lock as well, its code word is falcon."),
    Utterance("Nora", "The vet was pleased with the dog."),
    Utterance("Felix", "We cycled along the river."),
    Utterance("Nora", "The brakes squeal."),
]


def made(talk: list[Utterance]) -> Concordance:
    return concordance_of(talk, segments_of(talk))


def transcribed(talk: list[Utterance], question: str) -> NDArray[np.float64]:
    """The rule, utterance by utterance: idf of a question's words that it has, over that of all, less for other speakers."""
    parts = []
    for number, u in enumerate(talk):
        name = frozenset() if u.speaker in ("User", "Assistant", "Tool") else stems(u.speaker)
        texts = sentences(u.text) if len(u.text) > 500 else [u.text]
        parts += [(number // 4, stems(text) | name, name) for text in texts]
    wanted, n = stems(question), len(parts)
    out = np.zeros(-(-len(talk) // 4))
    idf = {
        t: np.log1p((n - df + 0.5) / (df + 0.5)) for t in wanted for df in [sum(t in p for _, p, _ in parts)]
    }
    every = max(sum(idf.values()), FEWEST * np.log1p((n + 0.5) / 0.5))
    someone = any(name & wanted for _, _, name in parts)
    for segment, held, name in parts:
        share = sum(idf[t] for t in wanted & held) / every
        out[segment] = max(out[segment], share if name & wanted or not someone else OTHERS * share)
    return out


def test_the_utterance_of_whom_the_question_names_counts_more() -> None:
    words = made(TALK)
    for name, segment in (("Nora", 0), ("Felix", 1)):
        found = words.coverage(f"What is the code word of the lock on {name}'s garden shed?")
        assert found[segment] == pytest.approx(1.0)
        assert 0.6 < found[1 - segment] < OTHERS


def test_words_of_several_utterances_do_not_add_up() -> None:
    found = made(TALK).coverage("Did the dog eat tomatoes by the river?")
    assert 0 < found.max() < 0.5


def test_rare_words_count_more() -> None:
    talk = [Utterance("User", text) for text in ["harbor cafe"] * 4 + ["harbor walnut"] + ["harbor"] * 7]
    cafe, walnut, _ = made(talk).coverage("the walnut in the cafe, thistle")
    assert 0 < cafe < walnut < 1


def test_one_common_word_is_not_all_of_a_question() -> None:
    talk = [Utterance("User", f"Perfect, the w{i}a is done") for i in range(8)]
    assert made(talk).coverage("Perfect!").max() < 0.1
    assert made(TALK).coverage("lantern").max() < 0.5


def test_where_nothing_can_be_found_nothing_is() -> None:
    assert not made(TALK).coverage("And what about it?").any()
    assert made(TALK).coverage("quartz").tolist() == [0.0, 0.0]
    assert Concordance().coverage("Where is the dog?").shape == (0,)


def test_labels_of_roles_are_no_names() -> None:
    talk = [Utterance(who, f"Number {i} of w{i}") for i, who in enumerate(["User", "Assistant"] * 4)]
    question = "Did the user or the assistant say w2 and w7?"
    assert made(talk).coverage(question) == pytest.approx(transcribed(talk, question))
    assert made(talk).coverage("Which user?").max() == 0


def test_a_long_utterance_counts_by_its_sentences() -> None:
    long = " ".join(f"Sentence number{i} is about thing{i} alone." for i in range(30))
    talk = [Utterance("Ann", long), *TALK]
    assert len(long) > 500
    one, both = made(talk).coverage("thing3")[0], made(talk).coverage("thing3 thing17 thing21")[0]
    assert 0 < both < one * 2
    assert made(talk).coverage("thing3 thing17 thing21")[0] == pytest.approx(
        transcribed(talk, "thing3 thing17 thing21")[0]
    )


SAID = st.lists(
    st.builds(
        Utterance,
        st.sampled_from(["Ann", "Bob Ann", "User", "Assistant"]),
        st.lists(st.sampled_from(["garden", "gardens", "ann", "bob", "user", "dog", "7", "the", "\u5e93"]), min_size=1)
        .map(" ".join),
    ),
    max_size=14,
)  # fmt: skip


@given(
    talk=SAID, question=st.lists(st.sampled_from(["garden", "ann's", "bob", "dog", "of", "7", "user", "cat"]))
)
def test_it_is_the_rule_exactly(talk: list[Utterance], question: list[str]) -> None:
    text = " ".join(question)
    assert made(talk).coverage(text) == pytest.approx(transcribed(talk, text), rel=1e-12, abs=1e-15)


@given(talk=SAID, kept=st.integers(0, 4), again=SAID)
def test_a_conversation_that_was_cut_is_like_a_new_one(
    talk: list[Utterance], kept: int, again: list[Utterance]
) -> None:
    whole = talk[: len(talk) // 4 * 4]
    words = made(whole)
    words.cut(kept)
    rest = whole[: 4 * kept] + again
    for segment in segments_of(rest)[len(words) :]:
        words.add(rest[segment.first : segment.last + 1])
    question = "ann's dog and the gardens of bob, 7 cats"
    assert len(words) == len(segments_of(rest))
    assert words.coverage(question).tolist() == pytest.approx(made(rest).coverage(question).tolist())
