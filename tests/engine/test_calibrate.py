"""Calibrating a model: once, the same every time, kept in a file that is made again when it is damaged."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from agentmem.engine import calibrate
from agentmem.engine.calibrate import POSITIONS, calibrated
from agentmem.engine.layout import layout
from agentmem.model.loaded import LoadedModel
from agentmem.model.random import random_model
from agentmem.quant.format import Code
from agentmem.runtime import Runtime, fingerprint
from agentmem.settings import Settings
from tests.runtime.agents import BUDGET, LONG, cached, memory, turn

MODEL = random_model("llama", seed=0)


def biased(layer: int = 0) -> LoadedModel:
    """A model whose keys in one layer have huge biases, as the first layers of some Qwen2.5 do."""
    model = random_model("qwen2", seed=1)
    projection = model.model.layers[layer].self_attn.k_proj
    projection.bias = projection.bias + 40 * mx.sign(
        mx.random.normal(projection.bias.shape, key=mx.random.key(5))
    )
    return model


def digest(model: LoadedModel, folder: Path, format: str = "q4") -> str | None:
    return layout(model, format, 64, folder).calibration


class Counted(nn.Module):
    """A model that counts its passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.passes = inner, 0

    @property
    def layers(self) -> Any:
        return self.inner.layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.passes += 1
        return self.inner(tokens, cache=cache)


def passes(model: LoadedModel, folder: Path) -> int:
    """How often the model reads something while it is laid out, probe aside."""
    counted = Counted(model.model)
    digest(dataclasses.replace(model, model=counted), folder)
    return counted.passes - 1


def test_a_model_is_read_once(tmp_path: Path) -> None:
    assert passes(MODEL, tmp_path) == len(POSITIONS)
    assert passes(MODEL, tmp_path) == 0
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (
        digest(MODEL, tmp_path)
        == digest(MODEL, tmp_path / "elsewhere")
        == layout(MODEL, "q4", 64).calibration
    )


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "folder"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    before = digest(MODEL, tmp_path)
    (file,) = tmp_path.iterdir()
    sound = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        flipped = bytearray(sound)
        flipped[-100] ^= 1
        file.write_bytes({"empty": b"", "cut": sound[: len(sound) // 2], "flipped": bytes(flipped)}[damage])
    assert passes(MODEL, tmp_path) == len(POSITIONS)
    assert "cannot be used" in caplog.text
    assert digest(MODEL, tmp_path) == before
    if damage != "folder":
        assert file.read_bytes() == sound


def test_files_are_apart_for_what_values_depend_on(tmp_path: Path) -> None:
    other_weights = dataclasses.replace(MODEL, identity={**MODEL.identity, "weights": "0" * 64})
    other_words = dataclasses.replace(MODEL, identity={**MODEL.identity, "chat_template": "0" * 64})
    for model, files in ((MODEL, 1), (other_weights, 2), (other_words, 2)):
        digest(model, tmp_path)
        assert len(list(tmp_path.iterdir())) == files
    digest(MODEL, tmp_path, "q3")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("format", ["q4-plain", "q4-rotated", "k8v4-plain", "q8-plain", "fp16"])
def test_formats_without_values_read_nothing(tmp_path: Path, format: str) -> None:
    assert digest(MODEL, tmp_path, format) is None
    assert list(tmp_path.iterdir()) == []


def test_values_are_part_of_the_fingerprint() -> None:
    plan = layout(MODEL, "q4", 64)
    prints = {
        fingerprint(MODEL.identity, dataclasses.replace(plan, calibration=value))
        for value in (None, "a", "b")
    }
    assert len(prints) == 3


def test_positions_stay_within_a_short_context() -> None:
    short = dataclasses.replace(MODEL, max_context=600)
    ends = [at + len(ids) for ids, at in calibrate._pieces(short)]
    assert max(ends) <= 600
    assert calibrated(short, layout(MODEL, "q4", 64).anatomy, layout(MODEL, "q4", 64).geometry.codecs).layers[
        0
    ].mean.shape == (2, 64)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_huge_biases_keeps_more_bits(tmp_path: Path, layer: int) -> None:
    """And conversations go on from its rows, which are longer than those of the other layer."""
    model = biased(layer)
    codecs = layout(model, "q4", 64).geometry.codecs
    assert codecs[layer].format.keys == Code(8, 32)
    assert codecs[1 - layer].format.keys == Code(4, 32)
    settings = Settings(home=tmp_path, ram_budget=BUDGET)  # type: ignore[arg-type]
    runtime = Runtime.open(settings, lambda: model)
    turn(runtime, "ada", LONG)
    assert runtime.health()["self_test"]["code_error"] <= 1.5
    runtime.close()
    runtime = Runtime.open(settings, lambda: model)
    assert cached(turn(runtime, "ada", "go on")) > 300
    runtime.close()


def test_other_values_leave_state_alone_and_a_lost_file_gives_the_same_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMEM_MODELS", str(tmp_path / "models"))
    settings = Settings(home=tmp_path / "home", ram_budget=BUDGET)  # type: ignore[arg-type]

    def opened() -> Runtime:
        return Runtime.open(settings, lambda: MODEL)

    runtime = opened()
    turn(runtime, "ada", LONG)
    runtime.close()
    (file,) = settings.paths.calibration.iterdir()
    file.unlink()
    runtime = opened()
    assert cached(turn(runtime, "ada", "go on")) > 300
    runtime.close()
    file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "POSITIONS", (0, 100))
        runtime = opened()
        reply = turn(runtime, "ada", "and then?")
        assert (cached(reply), memory(reply)["state_before"]) == (0, "cold")
        runtime.close()
    file.unlink()
    runtime = opened()
    assert runtime.agent("ada")["turns"] == 3
    assert cached(turn(runtime, "ada", "why?")) > 300
    runtime.close()
