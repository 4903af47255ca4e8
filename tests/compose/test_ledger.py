"""The ledger: when a template may be composed, and when no longer."""

from __future__ import annotations

import json

import pytest

from agentmem.compose.ledger import AUDITS, CASES, TEMPLATES, Bounds, Entry, Ledger, Pair

HOME, ASK, PLANNER = "home", b"ask", "kvcomm+tail"
FIXED = ((1, 2), (3,))


def seen(template: bytes = ASK, agent: str = "solver") -> Ledger:
    ledger = Ledger()
    ledger.saw(HOME, template, FIXED, (b"text",), agent)
    return ledger


def pairs(n: int, kl: float) -> list[Pair]:
    return [Pair(kl * (0.5 + i % 2), 2 * kl, 0.9 + 0.1 * (i % 2)) for i in range(n)]


def test_a_template_needs_enough_pairs_that_are_close_enough() -> None:
    ledger = seen()
    assert not ledger.may_compose(HOME, ASK, PLANNER)
    ledger.calibrate(HOME, ASK, PLANNER, pairs(19, 0.01))
    assert "19 pairs" in ledger.why_not(HOME, ASK, PLANNER)
    found = ledger.calibrate(HOME, ASK, PLANNER, pairs(20, 0.06))
    assert (found.pairs, found.kl, found.first_kl, found.top1) == pytest.approx((20, 0.06, 0.12, 0.95))
    assert "0.060" in ledger.why_not(HOME, ASK, PLANNER)
    ledger.calibrate(HOME, ASK, PLANNER, pairs(20, 0.04))
    assert ledger.may_compose(HOME, ASK, PLANNER)
    assert not ledger.may_compose(HOME, ASK, "kvcomm"), "a calibration is of one planner"
    assert not ledger.may_compose("elsewhere", ASK, PLANNER)
    ledger.calibrate(HOME, ASK, PLANNER, pairs(20, float("nan")))
    assert not ledger.may_compose(HOME, ASK, PLANNER)


def test_audits_demote_and_a_new_calibration_lifts_that() -> None:
    ledger = seen()
    ledger.calibrate(HOME, ASK, PLANNER, pairs(20, 0.01))
    for _ in range(3):
        ledger.audit(HOME, ASK, PLANNER, 0.01)
    ledger.audit(HOME, ASK, PLANNER, 0.1)
    assert ledger.may_compose(HOME, ASK, PLANNER), "one bad of four, the mean is within the bound"
    ledger.audit(HOME, ASK, PLANNER, 0.2)
    assert not ledger.may_compose(HOME, ASK, PLANNER)
    for _ in range(2 * AUDITS):
        ledger.audit(HOME, ASK, PLANNER, 0.0)
    assert not ledger.may_compose(HOME, ASK, PLANNER), "good audits lift nothing"
    ledger.calibrate(HOME, ASK, PLANNER, pairs(20, 0.01))
    assert ledger.may_compose(HOME, ASK, PLANNER)
    assert not ledger.entries[HOME, ASK].records[PLANNER].audits


def test_bounds_are_parameters() -> None:
    ledger = Ledger(Bounds(pairs=2, kl=0.5))
    ledger.saw(HOME, ASK, FIXED, (b"text",), "solver")
    ledger.calibrate(HOME, ASK, PLANNER, pairs(2, 0.4))
    assert ledger.may_compose(HOME, ASK, PLANNER)


def test_the_last_prompts_of_a_template_are_its_cases() -> None:
    ledger = seen()
    for n in range(CASES + 5):
        ledger.saw(HOME, ASK, FIXED, (bytes([n]),), "solver")
    ledger.saw(HOME, ASK, FIXED, (bytes([9]),), "solver")
    cases = ledger.cases(HOME, ASK)
    assert len(cases) == CASES
    assert cases[-2:] == [(bytes([CASES + 4]),), (bytes([9]),)]
    assert ledger.cases(HOME, b"other") == []


def test_templates_that_were_measured_stay() -> None:
    ledger = seen()
    ledger.calibrate(HOME, ASK, PLANNER, pairs(20, 0.01))
    for n in range(TEMPLATES + 10):
        ledger.saw(HOME, n.to_bytes(4, "big"), FIXED, (b"text",), "solver")
    assert len(ledger.entries) == TEMPLATES
    assert ledger.may_compose(HOME, ASK, PLANNER)


def test_an_entry_survives_json() -> None:
    ledger = seen()
    ledger.calibrate(HOME, ASK, PLANNER, pairs(20, 0.01))
    ledger.audit(HOME, ASK, PLANNER, 0.3)
    ledger.audit(HOME, ASK, "lego", 0.01)
    entry = ledger.entries[HOME, ASK]
    assert Entry.of_json(json.loads(json.dumps(entry.json()))) == entry


def test_templates_of_a_forgotten_agent_go() -> None:
    ledger = seen()
    ledger.saw(HOME, ASK, FIXED, (b"text",), "judge")
    ledger.saw(HOME, b"own", FIXED, (b"text",), "judge")
    ledger.forget(HOME, "judge")
    assert list(ledger.entries) == [(HOME, ASK)]
    ledger.forget("elsewhere")
    ledger.forget(HOME)
    assert not ledger.entries
