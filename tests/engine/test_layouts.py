"""Exact reuse on models whose layers keep other state than keys and values of every token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentmem.engine.layout import layout
from agentmem.engine.proof import prove
from agentmem.engine.windows import WindowPass
from agentmem.errors import ModelUnavailable
from agentmem.model.random import random_model
from agentmem.model.zoo import ZOO
from agentmem.runtime import Runtime, fingerprint
from agentmem.settings import Settings
from tests.engine.layouts import KINDS, LAYOUTS
from tests.engine.test_exact import check_trace


@pytest.mark.parametrize("format", ["q4", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_traces(tmp_path: Path, kind: str, format: str) -> None:
    """Random conversations, hot, evicted and restarted between turns: text, logits and fed tokens are the uninterrupted run's."""
    architecture, overrides = LAYOUTS[kind]
    for i in range(2):
        rng = random.Random(f"{kind} {format} {i}")
        model = random_model(architecture, seed=i, **overrides)
        check_trace(
            tmp_path / str(i), lambda m=model: m, rng, f"agent-{i}", longest=60, page_tokens=32, format=format
        )


@pytest.mark.parametrize("format", ["q4,0=k8v4", "q3,1=fp16", "k5v4", "k6v4,0=q8", "q4-stock"])
def test_traces_of_formats_by_layer(tmp_path: Path, format: str) -> None:
    model = random_model("llama", seed=4)
    check_trace(
        tmp_path, lambda: model, random.Random(format), "a", longest=60, page_tokens=32, format=format
    )


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("q4,9=k8v4", "layers 0 to 1"),
        ("q4,x", "not like 0=k8v4"),
        ("q4,0=q5", "unknown kv_format"),
        ("fp16,0=q4", "name a format that packs first"),
        ("q4,0=q4-stock", "different pages"),
    ],
)
def test_formats_that_make_no_sense_are_refused(tmp_path: Path, format: str, said: str) -> None:
    with pytest.raises(ModelUnavailable, match=said):
        Runtime.open(
            Settings(home=tmp_path, ram_budget="8MiB", kv_format=format),
            lambda: random_model("llama", seed=4),
        )


def test_formats_by_layer_are_other_state() -> None:
    model = random_model("llama", seed=4)
    prints = {
        fingerprint(model.identity, layout(model, f, 32)) for f in ("q4", "q4,0=k8v4", "q4,1=k8v4", "k8v4")
    }
    assert len(prints) == 4


def test_what_is_not_supported_is_refused_with_the_reason() -> None:
    for name, said in (
        ("gemma4_text", "keys of other layers"),
        ("mistral3", "hides tokens"),
        ("llama4", "ChunkedKVCache"),
    ):
        with pytest.raises(ModelUnavailable, match=said):
            layout(random_model(name, seed=1, **ZOO[name]), "q4", 32)


def test_a_model_that_its_caches_do_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is looked back on one token too far shows in what the model says."""
    architecture, overrides = LAYOUTS["window"]
    model = random_model(architecture, seed=1, **overrides | {"sliding_window": 12})
    plan = layout(model, "fp16", 32)
    prove(model, plan)
    monkeypatch.setattr(WindowPass, "mask", lambda *_: None)
    with pytest.raises(ModelUnavailable, match="other things with our caches"):
        prove(model, plan)
