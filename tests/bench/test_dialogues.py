"""Conversations of the benches: generated ones with planted facts, and files in the form of LoCoMo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.bench import locomo
from agentmem.bench.dialogues import generated
from agentmem.bench.routing import hit_rates, run, table
from agentmem.episode.encoder import encoder_of


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), topics=st.integers(1, 8), utterances=st.integers(6, 14))
def test_every_fact_is_said_once_and_asked_for(seed: int, topics: int, utterances: int) -> None:
    dialogue = generated(seed, topics, utterances)
    said = dialogue.utterances
    assert len(said) == topics * utterances
    assert len(dialogue.questions) == topics
    assert generated(seed, topics, utterances) == dialogue
    for question in dialogue.questions:
        (evidence,) = question.evidence
        assert said[evidence].speaker in question.text
        for answer in (question.answer, *question.others):
            assert sum(answer.strip() in u.text.rstrip(".").split() for u in said) == 1
        assert said[evidence].text == f"{question.lead}{question.answer}."
    assert len({u.text for u in said}) == len(said)


def test_topics_come_back_in_every_session() -> None:
    dialogue = generated(3)
    assert len(dialogue.sessions) == 3
    assert all(15 <= len(said) <= 30 for _, said in dialogue.sessions)
    assert generated(4) != dialogue


FILE = [
    {
        "sample_id": "own-1",
        "conversation": {
            "speaker_a": "Ann",
            "session_2": [{"speaker": "Bob", "dia_id": "D2:1", "text": "Sold."}],
            "session_1_date_time": "1 May",
            "session_1": [
                {"speaker": "Ann", "dia_id": "D1:1", "text": " The boat? "},
                {"speaker": "Ann", "dia_id": "D1:2", "text": ""},
            ],
        },
        "qa": [
            {"question": "When?", "answer": 2022, "evidence": ["D2:1; D1:1", "D9:9"], "category": 2},
            {"question": "What?", "answer": "boat", "evidence": ["D1:2"], "category": 4},
            {"question": "Who?", "adversarial_answer": "x", "evidence": ["D1:1"], "category": 5},
        ],
    }
]


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(FILE))
    (dialogue,) = locomo.read(path)
    assert [date for date, _ in dialogue.sessions] == ["1 May", ""]
    assert [(u.speaker, u.text) for u in dialogue.utterances] == [("Ann", "The boat?"), ("Bob", "Sold.")]
    assert [(q.text, q.answer, q.evidence, q.dated) for q in dialogue.questions] == [
        ("When?", "2022", (0, 1), True), ("What?", "boat", (), False),
    ]  # fmt: skip


@pytest.mark.parametrize("content", [None, "[{}]", "[1]", "{", '{"a": 1}'])
def test_a_file_that_is_none_says_so(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "own.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"own\.json" if content is None else "own|Expecting"):
        locomo.read(path)


@pytest.mark.slow
def test_words_route_questions_about_planted_facts() -> None:
    dialogues = [generated(seed) for seed in range(4)]
    rates = hit_rates(encoder_of("hash512"), dialogues, 4)
    assert rates["questions"] == 24
    assert rates["alone"] > 0.9 > 0.4 > rates["chance"]
    assert rates["alone"] > rates["vote"]
    assert rates["each"].keys() == {d.name for d in dialogues}


@pytest.mark.slow
def test_the_bench_has_a_row_for_each_and_checks_what_was_promised() -> None:
    result = run([encoder_of("hash512")], {"planted": [generated(0)]}, counts=(2, 4))
    assert [(r["set"], r["episodes"]) for r in result["rows"]] == [("planted", 2), ("planted", 4)]
    assert result["checks"] == []
    assert len(table(result).splitlines()) == 3
