"""Scores are those of the formula, in whatever pieces and of whatever rows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from agentmem.episode.line import Line
from agentmem.episode.passes import Pass
from agentmem.episode.scores import cross_scores
from tests.episode.state import BOTH, World, text, world_of

SEEN = text(90)
PROMPT = text(30, seed=1)


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> World:
    return world_of(request.param)


def formula(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """max over the group's queries and the prompt's tokens of softmax over the cached rows, in float64."""
    group = len(queries) // len(keys)
    out = np.zeros(keys.shape[:2])
    for head, rows in enumerate(keys.astype(np.float64)):
        for query in queries[head * group : (head + 1) * group].astype(np.float64):
            for token in query:
                products = rows @ token * scale
                weights = np.exp(products - products.max())
                out[head] = np.maximum(out[head], weights / weights.sum())
    return out


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3), (3, 2)])
def test_scores_are_the_formula_of_float64(heads: int, group: int) -> None:
    draw = np.random.default_rng(heads)
    queries = draw.normal(size=(heads * group, 21, 64)).astype(np.float32) * 2
    keys = draw.normal(size=(heads, 50, 64)).astype(np.float32)
    got = np.array(cross_scores(mx.array(queries), mx.array(keys), scale=0.125))
    assert np.abs(got - formula(queries, keys, 0.125)).max() < 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_change_rounding_at_most(chunk: int) -> None:
    """A BLAS sums in another order for few rows than for many: 1e-5 of a score, while each size gives the same bits again."""
    draw = np.random.default_rng(1)
    queries, keys = draw.normal(size=(6, 130, 64)), draw.normal(size=(2, 200, 64))
    one, other, again = (
        np.array(
            cross_scores(
                mx.array(queries, dtype=mx.float32), mx.array(keys, dtype=mx.float32), scale=0.2, chunk=c
            )
        )
        for c in (130, chunk, chunk)
    )
    assert (np.abs(one - other) <= 1e-5 * one).all()
    assert np.array_equal(other, again)


def test_room_is_neither_scored_nor_counted() -> None:
    draw = np.random.default_rng(2)
    queries = mx.array(draw.normal(size=(4, 9, 64)), dtype=mx.float32)
    keys = mx.array(draw.normal(size=(2, 12, 64)), dtype=mx.float32)
    visible = mx.array(np.arange(12)[None] < np.array([[12], [5]]))
    got = cross_scores(queries, keys, scale=0.1, visible=visible)
    short = cross_scores(queries[2:], keys[1:, :5], scale=0.1)
    assert mx.allclose(got[1, :5], short[0], atol=1e-7)
    assert not got[1, 5:].any()


class Watched(Pass):
    """Keeps what a prompt's tokens ask, and the keys that are there."""

    def seen(self, line: Line, queries: mx.array, past: tuple[mx.array, ...], scale: float) -> None:
        self.queries, self.past, self.scale = queries, past[0], scale


@pytest.mark.parametrize("format", ["whole", "q4-plain", "q4-rotated"])
def test_a_prompt_scores_rows_of_any_format(world: World, format: str) -> None:
    held = world.read(SEEN, format)
    passes = [Watched(lambda line=line: line, held.tokens) for line in held.lines]
    world.network.logits(mx.array([PROMPT]), passes, [])
    for line, seen, layer in zip(held.lines, passes, held.score(PROMPT, chunk=8), strict=True):
        wanted = formula(np.array(seen.queries[0]), np.array(seen.past), seen.scale)
        assert line.lead.shape[1] == 4
        assert np.abs(np.stack(layer) - wanted[:, 4:]).max() < 2e-6


def test_a_prompt_begins_one_behind_the_last_token_and_sees_itself(world: World) -> None:
    """Its tokens are read as any others: the queries that score are those of the whole text read at once."""
    held = world.read(SEEN)
    passes = [Watched(lambda line=line: line, held.tokens) for line in held.lines]
    world.network.logits(mx.array([PROMPT]), passes, [])
    whole = [Watched(lambda line=line: line, 0) for line in world.held().lines]
    world.network.logits(mx.array([SEEN + PROMPT]), whole, [])
    for got, want in zip(passes, whole, strict=True):
        assert mx.abs(got.queries - want.queries[:, :, len(SEEN) :]).max() < 1e-3


@pytest.mark.parametrize("heads", BOTH)
def test_scoring_leaves_nothing_behind(world: World, heads: str) -> None:
    held = world.read(SEEN)
    held.evict(held.score(PROMPT), [40] * 3, heads)
    before, tokens = held.most_rows(), held.tokens
    first, again = held.score(PROMPT), held.score(PROMPT)
    assert (held.most_rows(), held.tokens) == (before, tokens)
    assert all(
        np.array_equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True)
    )
