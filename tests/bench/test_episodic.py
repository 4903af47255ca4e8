"""The bench of episodes on a tiny model: what must come out whatever the model says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agentmem.bench.answers import Journal, Record, Table, ratio
from agentmem.bench.dialogues import generated
from agentmem.bench.episodic import POLICIES, Contest, Ground, Setting, run
from agentmem.bench.judge import Judge
from agentmem.bench.transcripts import Dialogue, Frame, Question, evenly, first_that_fit
from agentmem.episode.hashed import HashedEncoder
from agentmem.episode.selection import Heads
from agentmem.episode.utterance import Utterance
from agentmem.model import seam
from agentmem.model.random import byte_tokenizer, random_model


def setting(*policies: str) -> Setting:
    return Setting(policies, 3, 3, 2, 1, 256, Heads.RAGGED, "q4-plain", 300)


@pytest.fixture(scope="module")
def ground() -> Ground:
    model = random_model("llama", seed=3)
    seam.install(model.model)
    return Ground(model, HashedEncoder(), "q4-plain", None)


def short() -> Dialogue:
    said = tuple(
        Utterance("Ada" if i % 2 else "Bo", f"The tide of day {i} came in at {i}.") for i in range(12)
    )
    sessions = tuple((f"{n} May", said[n * 4 : n * 4 + 4]) for n in range(3))
    asked = tuple(
        Question(f"When did day {i} come in?", f"At {i}", (i,), others=("At 2", "At 9") * (i == 5))
        for i in (2, 5, 9)
    )
    return Dialogue("short", sessions, asked)


def test_a_history_is_as_many_sessions_as_fit_and_its_questions() -> None:
    frame = Frame(byte_tokenizer())
    whole = first_that_fit(short(), frame, 3, 10_000)
    assert whole == short()
    two = first_that_fit(short(), frame, 2, 10_000)
    assert [q.evidence for q in two.questions] == [(2,), (5,)]
    limit = len(frame.history(two.text))
    assert first_that_fit(short(), frame, 3, limit) == two
    assert len(first_that_fit(short(), frame, 3, limit - 1).sessions) == 1
    with pytest.raises(ValueError, match="first session"):
        first_that_fit(short(), frame, 3, 10)
    assert [n for n, _ in evenly(whole.questions * 3, 3)] == [0, 3, 6]


def test_a_question_continues_the_message_and_the_reply_begins() -> None:
    tokenizer = byte_tokenizer()
    frame = Frame(tokenizer)
    question, answer = frame.question(short().questions[0])
    whole = tokenizer.decode([*frame.history("Once."), *question, *answer])
    said = whole.partition("<|im_start|>assistant\n")
    assert said[0].endswith("Question: When did day 2 come in?<|im_end|>\n")
    assert said[2] == "At 2"


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_of_everything_costs_nothing(ground: Ground, policy: str) -> None:
    """Every policy then predicts what the full cache does; packed rows cost their rounding."""
    contest = Contest(ground, short(), setting(policy))
    records = contest.measured(policy, 1)
    own = [r for r in records if r.policy == policy]
    assert [r.question for r in own] == [0, 1, 2]
    bound = 0.2 if policy.startswith("packed") else 1e-5
    assert max(r.kl for r in records) < bound
    if not policy.startswith("packed"):
        assert all(r.top1 == 1 for r in records)


@pytest.mark.slow
def test_records_are_gathered_and_a_run_goes_on(ground: Ground, tmp_path: Path) -> None:
    journal, said = Journal(tmp_path / "journal"), list[str]()
    first = run(ground, [short()], [4], setting("streaming", "matched", "views"), journal, said.append)
    policies = [row["policy"] for row in first["rows"]]
    assert {"full", "streaming", "matched", "mismatched", "views"} <= set(policies)
    full = next(row for row in first["rows"] if row["policy"] == "full" and not row["planted"])
    assert full["kl"] == pytest.approx(0, abs=1e-6)
    assert next(row["kl"] for row in first["rows"] if row["policy"] == "streaming") > 1e-4
    rows = next(c for c in first["checks"] if c["name"].startswith("rows"))
    assert rows["value"] == 1
    again, timed = Journal(tmp_path / "journal"), len(said)
    second = run(ground, [short()], [4], setting("streaming", "matched", "views"), again, said.append)
    assert second["rows"] == first["rows"]
    assert not any("streaming" in line and line.startswith("short") for line in said[timed:])


def test_a_journal_is_of_one_setting(tmp_path: Path) -> None:
    one = Journal(tmp_path / "journal", {"block": 64})
    one.add([record(0, "full", 0.0)])
    again = Journal(tmp_path / "journal", {"block": 64})
    assert again.records == one.records
    assert again.has("c", 4, "full")
    assert not again.has("c", 4, "matched")
    with pytest.raises(ValueError, match="other settings"):
        Journal(tmp_path / "journal", {"block": 65})


def record(
    question: int, policy: str, kl: float, *, planted: bool = False, exact: bool = False, tokens: int = 1
) -> Record:
    return Record("c", question, 4, policy, kl, 0.5, 1.0, exact, planted, tokens)


def test_only_questions_that_both_answered_are_compared() -> None:
    table = Table([
        *(record(n, "matched", 1.0 + n) for n in range(4)), *(record(n, "kvzip", 2.0 + 2 * n) for n in range(1, 3)),
        *(record(n, "snapkv", 9.0) for n in range(4)),
    ])  # fmt: skip
    found = table.compared(4, "matched", "kvzip")
    assert found is not None
    assert (found["ratio"], found["low"], found["high"], found["questions"]) == (0.5, 0.5, 0.5, 2)
    assert table.best_baseline(4) == "kvzip"
    assert table.compared(4, "matched", "streaming") is None
    best = next(c for c in table.checks() if "kvzip" in c["name"])
    assert (best["value"], best["holds"]) == (0.5, True)


def test_recall_is_of_what_the_full_cache_recalls() -> None:
    facts = [record(n, "full", 0, planted=True, exact=n < 2) for n in range(4)]
    ours = [record(n, "matched", 0, planted=True, exact=n == 0) for n in range(4)]
    found = next(c for c in Table([*facts, *ours]).checks() if "planted" in c["name"])
    assert (found["value"], found["holds"]) == (0.5, False)


def test_an_interval_is_of_pairs() -> None:
    """What is always two thirds has no spread, however much questions differ."""
    draw = np.random.default_rng(0).random(30) * 5
    ours, theirs, turned = (
        [record(n, "", kl) for n, kl in enumerate(values)] for values in (2 * draw, 3 * draw, 2 * draw[::-1])
    )
    assert ratio(ours, theirs) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    value, low, high = ratio(ours, turned)
    assert value == pytest.approx(1)
    assert low < 0.95
    assert high > 1.05


def test_means_are_over_tokens() -> None:
    a = [record(0, "a", 1.0, tokens=9), record(1, "a", 0.0)]
    b = [record(0, "b", 1.0, tokens=9), record(1, "b", 10.0)]
    assert next(r["kl"] for r in Table(a).rows()) == pytest.approx(0.9)
    assert ratio(a, b)[0] == pytest.approx(9 / 19)


def test_a_planted_fact_is_recalled_when_no_other_of_its_kind_is_likelier(ground: Ground) -> None:
    full = ground.read(ground.frame.history("The code is 4711."), ground.whole)
    asked, answer, other = (ground.model.tokenizer.encode(t) for t in ("Which code?", " 4711", " 1234"))
    found = [
        Judge(full, [(asked, a)], {0: [b]}).scores(full)[0][3] for a, b in ((answer, other), (other, answer))
    ]
    assert sorted(found) == [False, True]


@pytest.mark.slow
def test_generated_conversations_are_measured(ground: Ground) -> None:
    dialogue = generated(0, topics=2, utterances=6)
    contest = Contest(ground, dialogue, setting("views"))
    assert all(r.planted for r in contest.measured("views", 4))
