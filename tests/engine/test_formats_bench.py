"""The bench of formats: what it compares, and that its figures follow what a format keeps."""

from __future__ import annotations

from typing import Any

import pytest

from agentmem.bench import formats
from agentmem.bench.formats import checks, own_texts, run
from agentmem.model.random import random_model

MODEL = random_model("llama", seed=0)


def measured(*names: str, text: str = "the keeper counts the oil, night by night; " * 10) -> dict[str, Any]:
    return run(MODEL, names, {"a": text}, history=200, fed=40, calibrations=None, say=lambda _: None)


def test_finer_formats_cost_less_and_take_more() -> None:
    rows = measured("fp16", "q8-plain", "q4", "q3")["rows"]
    assert [r["format"] for r in rows] == ["fp16", "q8-plain", "q4", "q3"]
    assert [r["bits"] for r in rows] == [16, 8.5, 4.5, 3.75]
    losses = [r["kl"] for r in rows]
    assert losses == sorted(losses)
    assert losses[0] < 1e-5
    assert losses[3] > 10 * losses[1]
    assert rows[0]["top1"] == 1
    assert all(r["kl_texts"] == [r["kl"]] and r["kl"] <= r["kl_p95"] * 2 for r in rows)


def test_predictions_are_those_of_the_text_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of another text are another history: the distance shows it."""
    again = formats.Reading.again

    def forgetful(reading: formats.Reading, plan: Any) -> Any:
        for layer in reading.layers:
            layer.values = layer.values[:, :, ::-1]
        return again(reading, plan)

    sound = measured("fp16")["rows"][0]["kl"]
    monkeypatch.setattr(formats.Reading, "again", forgetful)
    assert measured("fp16")["rows"][0]["kl"] > 1000 * sound


def test_short_texts_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a has 5 tokens; 240 are needed"):
        measured("fp16", text="hello")


def test_its_own_texts_are_long_enough_and_not_the_calibrations() -> None:
    texts = own_texts()
    assert len(texts) == 4
    assert all(len(text) > 4500 for text in texts.values())
    assert not any("The ferry to the outer islands" in text for text in texts.values())


def test_the_default_format_is_held_against_plain_four_bits() -> None:
    (check,) = checks([{"format": "q4", "kl": 0.002}, {"format": "q4-plain", "kl": 0.008}])
    assert (check["value"], check["holds"]) == (0.25, True)
    (check,) = checks([{"format": "q4", "kl": 0.006}, {"format": "q4-plain", "kl": 0.008}])
    assert not check["holds"]
    assert checks([{"format": "q4", "kl": 0.002}]) == []
