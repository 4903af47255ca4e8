"""The bench of formats: what it compares, and that its figures follow what a format keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agentmem.bench import formats
from agentmem.bench.cases import texts
from agentmem.bench.formats import checks, run
from agentmem.bench.pagewise import SCHEMES, Paged, channels, mean_and_rotation
from agentmem.bench.pagewise import rows as by_rows
from agentmem.model.random import random_model

MODEL = random_model("llama", seed=0)


def measured(
    *names: str, text: str = "the keeper counts the oil, night by night; " * 10, schemes: Sequence[Paged] = ()
) -> dict[str, Any]:
    return run(
        MODEL, names, {"a": text}, history=200, fed=40, calibrations=None, say=lambda _: None, schemes=schemes
    )


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


def test_no_text_is_the_calibrations() -> None:
    assert not any("The ferry to the outer islands" in text for text in texts().values())


def test_schemes_that_look_across_a_page_find_what_its_rows_have_in_common() -> None:
    """Keys with a mean, or channels of a size of their own, lose less so than row by row; values are those of rows."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 3, 64, 64)).astype(np.float32)
    shifted = mx.array(noise + 20 * rng.standard_normal((2, 3, 1, 64)))
    sized = mx.array(noise * np.exp(2 * rng.standard_normal((2, 3, 1, 64))))

    def lost(made: mx.array, given: mx.array) -> float:
        return float(mx.abs(made - given).mean().item())

    for keys in (shifted, sized):
        assert lost(channels(keys, 4), keys) < 0.6 * lost(by_rows(keys, 4), keys)
    assert lost(mean_and_rotation(shifted, 4), shifted) < 0.3 * lost(by_rows(shifted, 4), shifted)


def test_they_stand_beside_the_formats_and_keep_the_first_page() -> None:
    found = {r["format"]: r for r in measured("fp16", "q4", schemes=SCHEMES)["rows"]}
    assert [*found] == ["fp16", "q4", *(s.name for s in SCHEMES)]
    four, three = (found[f"channels of a page, {bits} bits"] for bits in (4, 3))
    assert 0 < four["kl"] < three["kl"]
    assert (four["bits"], three["bits"]) == (4.5, 3.5)
    x = mx.random.normal((3, 150, 64))
    packed = Paged._packed(x, 4, channels)
    same = np.array((packed == x).all((0, 2)))
    assert same[:64].all()
    assert not same[64:128].any()
    assert same[128:].all()


def test_the_default_format_is_held_against_plain_four_bits() -> None:
    (check,) = checks([{"format": "q4", "kl": 0.002}, {"format": "q4-plain", "kl": 0.008}])
    assert (check["value"], check["holds"]) == (0.25, True)
    (check,) = checks([{"format": "q4", "kl": 0.006}, {"format": "q4-plain", "kl": 0.008}])
    assert not check["holds"]
    assert checks([{"format": "q4", "kl": 0.002}]) == []
