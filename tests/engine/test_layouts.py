"""Exact reuse on models whose layers keep other state than keys and values of every token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentmem.model.random import random_model
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
