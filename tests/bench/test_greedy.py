"""Answers of many prompts at once are those of each prompt alone."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from agentmem.bench.greedy import answers
from agentmem.bench.held import Holder
from agentmem.compose.prompt import Prompt
from agentmem.engine.layout import layout
from tests.compose.prompts import Stage, apart, stage

TEXTS = ("How much oil is left?", "Who?", "Why did the lamp go out before the tide had turned at the reef?")
TOKENS = 6


@pytest.fixture(scope="module")
def world() -> Stage:
    return stage("llama")


def read(world: Stage, text: str) -> tuple[Prompt, mx.array]:
    prompt = world.prompt()
    return prompt, prompt.read(world.ids(text))


def alone(prompt: Prompt, logits: mx.array) -> list[int]:
    said: list[int] = []
    while len(said) < TOKENS:
        said.append(int(np.array(logits).argmax()))
        logits = prompt.read(said[-1:])
    return said


def layers(prompt: Prompt, start: int, stop: int) -> list[tuple[mx.array, mx.array]]:
    out = []
    for line in prompt.lines:
        assert line.keys is not None
        assert line.values is not None
        out.append((line.keys[:, start:stop], line.values[:, start:stop]))
    return out


def test_answers_of_many_prompts_are_those_of_each(world: Stage) -> None:
    prompts = [read(world, text) for text in TEXTS]
    held = [layers(p, 0, len(p) - 1) for p, _ in prompts]
    found = answers(world.network, held, [p.ids[-1] for p, _ in prompts], TOKENS, ())
    for (prompt, logits), (said, state) in zip(prompts, found, strict=True):
        n = len(prompt)
        assert said == alone(prompt, logits)
        for got, want in zip(state, layers(prompt, n, n + TOKENS), strict=True):
            assert max(apart(a, b) for a, b in zip(got, want, strict=True)) < 1e-3


def test_an_answer_ends_where_the_model_says_so_but_has_one_token(world: Stage) -> None:
    prompts = [read(world, text) for text in TEXTS]
    held = [layers(p, 0, len(p) - 1) for p, _ in prompts]
    last = [p.ids[-1] for p, _ in prompts]
    free = [said for said, _ in answers(world.network, held, last, TOKENS, ())]
    for end in {free[0][0], free[1][2]}:
        for said, (ids, state) in zip(free, answers(world.network, held, last, TOKENS, {end}), strict=True):
            stop = next((n for n, token in enumerate(said) if token == end and n), TOKENS)
            assert ids == said[:stop]
            assert all(k.shape[1] == v.shape[1] == stop for k, v in state)


@pytest.mark.parametrize(("format", "bound"), [("fp16", 2e-3), ("q4", 0.2)])
def test_what_a_format_makes_of_a_prompt(world: Stage, format: str, bound: float, tmp_path: Path) -> None:
    """Keys are the model's again. Pages stay in order here: the first one, packed ones, and the tail behind the first."""
    text = TEXTS[2] * 3
    prompt, _ = read(world, text)
    n = len(prompt) - 1
    assert n > 128
    restored = Holder(layout(world.model, format, 64, tmp_path)).restored(prompt)
    tail = n % 64
    order = [*range(64), *range(n - tail, n), *range(64, n - tail)] if format == "q4" else list(range(n))
    for got, want in zip(restored, layers(prompt, 0, n), strict=True):
        for a, b in zip(got, want, strict=True):
            b = b[:, mx.array(order)]
            assert (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item() < bound
