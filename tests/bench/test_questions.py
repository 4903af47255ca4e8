"""The questions of `bench compose`: enough of them, and none twice."""

from __future__ import annotations

from agentmem.bench.team import QUESTIONS, TASKS, families


def test_families_have_questions_for_anchors_and_for_measuring() -> None:
    seen: set[str] = set()
    for questions in QUESTIONS:
        found = families(questions)
        assert len(found) == 3
        for family in found:
            assert set(family.roles) == set(TASKS)
            assert len(family.questions) >= 20 + 6
            assert not seen & set(family.questions)
            assert len(set(family.questions)) == len(family.questions)
            seen |= set(family.questions)
