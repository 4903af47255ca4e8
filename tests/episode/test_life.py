"""What a conversation is about: taken in as it grows, kept as records, read back the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.episode.hashed import HashedEncoder
from agentmem.episode.life import Life
from agentmem.episode.topics import LEAST
from agentmem.model.random import random_model

pytestmark = pytest.mark.slow(minutes=0.1)  # scikit-learn takes seconds to come

SUBJECTS = (
    ["garden", "seeds", "tulips", "fence", "soil", "compost", "watering", "roses"],
    ["guitar", "chords", "concert", "melody", "drummer", "rehearsal", "song", "album"],
    ["flight", "passport", "hotel", "luggage", "airport", "visa", "ticket", "island"],
)
Message = dict[str, Any]


def talk(turns: int, subject: int = 0, seed: int = 0) -> list[Message]:
    """Turns about one subject: two utterances each, so that two turns are a segment."""
    rng = np.random.default_rng([seed, subject, turns])
    said = [" ".join(rng.choice(SUBJECTS[subject], 5)) for _ in range(2 * turns)]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def state(life: Life) -> tuple[Any, ...]:
    """All that is kept, to the bit."""
    arrays, facts = life._topics.state()
    return {k: (a.dtype, a.shape, a.tobytes()) for k, a in arrays.items()}, facts, life.segments, life.titles


def sent(records: list[Message]) -> list[Message]:
    return json.loads(json.dumps(records))


def grown(messages: list[Message], episodes: int | None = None) -> Life:
    life = Life(HashedEncoder(), episodes)
    life.grow(messages)
    return life


THREE = [m for subject in range(3) for m in talk(30, subject)]


def test_growing_by_turns_takes_in_what_growing_at_once_does() -> None:
    life = Life(HashedEncoder())
    changes = [life.grow(THREE[: 2 * n]) for n in range(1, len(THREE) // 2 + 1)]
    at_once = grown(THREE)
    assert changes == [False, True] * (len(changes) // 2)
    assert life.segments == at_once.segments
    assert len(life.segments) == len(THREE) // 4
    assert np.array_equal(life.embeddings, at_once.embeddings)
    assert not life.grow(THREE)


def test_topics_begin_where_there_is_enough() -> None:
    unlike = [{"role": "user", "content": f"w{i}a w{i}b w{i}c"} for i in range(4 * LEAST)]
    life = Life(HashedEncoder())
    life.grow(unlike[:-1])
    assert life.topics == []
    assert life.grow(unlike)
    assert len(life.topics) == 2


def test_a_question_goes_to_the_subject_it_is_about() -> None:
    life = grown(THREE, episodes=3)
    for subject, words in enumerate(SUBJECTS):
        found = life.route(" ".join(words[:6]))
        members = next(t.members for t in life.topics if t.id == found.topic)
        assert set(members) == set(range(15 * subject, 15 * subject + 15))
        assert life.titles[found.topic].split(", ")[0] in words
    assert life.hits == {}
    assert Life(HashedEncoder()).route("Where is the garden?").topic is None


def test_a_question_goes_to_where_its_words_were_said_also_after_an_edit_and_a_restart() -> None:
    said = [dict(m) for m in THREE]
    said[10]["content"] += " zirkon kobold"
    life = grown(said, episodes=3)
    guitar, asked = SUBJECTS[1][0], "zirkon kobold"
    home = next(t.id for t in life.topics if 10 // 4 in t.members)
    away = life.route(guitar).topic
    assert away != home
    found = life.route(f"{guitar} {asked}")
    assert found.topic == home
    restored = Life.restored(HashedEncoder(), said, sent([life.record()]), 3)
    assert restored.route(f"{guitar} {asked}") == found
    edited = [*said[:8], *[dict(m) for m in THREE[8:]]]
    restored.grow(edited)
    assert restored.route(f"{guitar} {asked}").topic != home


def test_what_stands_for_a_topic() -> None:
    life = grown([{**m, "content": f"{m['content']}\n" * 9} for m in THREE], episodes=3)
    tokenizer = random_model("llama", seed=1).tokenizer
    for topic in life.topics:
        lines = life.lines(topic.id)
        assert len(lines) == len(topic.representatives)
        assert all(0 < len(line) <= 120 and len(line.splitlines()) == 1 for line in lines)
        assert 0 < len(life.prompt(topic.id, tokenizer, 200)) <= 200


def test_edited_history_is_taken_in_anew_from_the_edit_on() -> None:
    life = grown(THREE, episodes=3)
    before = {t.id: t.members for t in life.topics}
    rows, records = life.embeddings.copy(), [life.record()]
    edited = [*THREE[:100], *talk(10, 1, seed=5)]
    assert life.grow(edited)
    assert life.segments == grown(edited).segments
    assert np.array_equal(life.embeddings, grown(edited).embeddings)
    assert np.array_equal(life.embeddings[:25], rows[:25])
    garden = next(n for n, members in before.items() if 0 in members)
    assert 0 in next(t.members for t in life.topics if t.id == garden)
    records.append(life.record())
    assert state(Life.restored(HashedEncoder(), edited, sent(records), 3)) == state(life)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.integers(0, 2), st.integers(1, 24)),
        st.tuples(st.sampled_from(["hit", "build", "edit", "record"]), st.integers(0, 40), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_what_was_recorded_comes_back_the_same(steps: list[tuple[str, int, int]]) -> None:
    messages = talk(34)
    life, records = grown(messages), []
    for number, (kind, which, count) in enumerate(steps):
        known = [t.id for t in life.topics]
        if kind == "say":
            messages = [*messages, *talk(count, which, seed=number)]
            life.grow(messages)
        elif kind == "edit":
            messages = messages[: max(0, len(messages) - which)]
            life.grow(messages)
        elif kind == "record":
            records.append(life.record())
        elif known:
            (life.hit if kind == "hit" else life.built)(known[which % len(known)])
    records = [r for r in (*records, life.record()) if r is not None]
    assert life.record() is None
    restored = Life.restored(HashedEncoder(), messages, sent(records))
    assert state(restored) == state(life)
    assert restored.record() is None
    more = [*messages, *talk(20, 2, seed=99)]
    assert life.grow(more) == restored.grow(more)
    assert state(restored) == state(life)


def test_messages_behind_the_last_record_are_taken_in() -> None:
    life = grown(THREE[:100])
    records = [life.record()]
    life.grow(THREE)
    assert state(Life.restored(HashedEncoder(), THREE, sent(records))) == state(life)


def recorded() -> list[Message]:
    life, records = Life(HashedEncoder()), []
    for end in (80, 120, len(THREE)):
        life.grow(THREE[:end])
        life.hit(life.topics[0].id)
        life.built(life.topics[0].id)
        records.append(life.record())
    return sent(records)


JUNK = st.one_of(
    st.none(), st.integers(-3, 2**40), st.text(max_size=4), st.just([]), st.just({}), st.just([[1]])
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_record_never_raises(data: st.DataObject) -> None:
    records = recorded()
    number = data.draw(st.integers(0, 2))
    key = data.draw(st.sampled_from(sorted(records[number])))
    records[number][key] = data.draw(JUNK)
    life = Life.restored(HashedEncoder(), THREE, records)
    assert life.segments == grown(THREE).segments
    assert np.array_equal(life.embeddings, grown(THREE).embeddings)
    assert [life.stale(t.id) in (True, False) for t in life.topics]
    assert life.route("tulips and roses in the garden").topic is not None
    assert life.grow([*THREE, *talk(12, 1, seed=3)])
    json.dumps(life.record())


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_record_is_noticed(lost: int) -> None:
    records = recorded()
    del records[lost]
    assert state(Life.restored(HashedEncoder(), THREE, records)) == state(grown(THREE))


def test_records_of_others_are_left() -> None:
    records = recorded()
    other = talk(90, 2, seed=7)
    assert state(Life.restored(HashedEncoder(), other, records)) == state(grown(other))
    records[0]["encoder"] = "minilm"
    assert state(Life.restored(HashedEncoder(), THREE, records)) == state(grown(THREE))


def test_a_life_that_began_anew_is_read_back_from_there() -> None:
    records = recorded()
    records[0]["encoder"] = "minilm"
    life = Life.restored(HashedEncoder(), THREE, records)
    life.hit(life.topics[0].id)
    records.append(life.record())
    assert state(Life.restored(HashedEncoder(), THREE, sent(records))) == state(life)


def test_a_record_of_one_more_turn_is_small() -> None:
    life, messages = Life(HashedEncoder()), [m for n in range(4) for m in talk(150, n % 3, seed=n)]
    for end in range(4, len(messages) + 1, 2):
        life.grow(messages[:end])
        record = life.record()
        assert record is None or len(json.dumps(record)) < 8192
