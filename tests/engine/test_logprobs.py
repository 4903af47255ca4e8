"""Log probabilities are the model's own, in float32, whatever the sampler makes of them."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from agentmem.engine.logprobs import LOWEST, Ranking
from agentmem.engine.request import TokenLogprob


def read(logits: mx.array, token: int, top: int) -> TokenLogprob:
    ranking = Ranking(logits, mx.array(token), top)
    mx.eval(ranking.arrays)
    return ranking.read(lambda t: b"<%d>" % t)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_they_are_those_of_a_float64_reference(dtype: mx.Dtype, top: int) -> None:
    rng = np.random.default_rng(top)
    logits = mx.array(rng.permutation(np.linspace(-8, 8, 100)).astype(np.float32)).astype(dtype)
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    want = exact - np.log(np.exp(exact).sum())
    order = np.argsort(-want, kind="stable")
    for token in (int(order[0]), int(order[50])):
        got = read(logits, token, top)
        assert (got.token, got.piece) == (token, b"<%d>" % token)
        assert got.logprob == pytest.approx(want[token], abs=1e-5)
        assert [t.token for t in got.top] == order[:top].tolist()
        assert [t.logprob for t in got.top] == pytest.approx(want[order[:top]], abs=1e-5)
        assert all(t.piece == b"<%d>" % t.token and t.top == () for t in got.top)


@pytest.mark.parametrize("token", [0, 3, 9])
def test_among_equals_the_chosen_token_is_first(token: int) -> None:
    logits = mx.zeros(10)
    for top in (1, 2, 10):
        got = read(logits, token, top)
        assert got.top[0].token == token
        assert len({t.token for t in got.top}) == top
    unequal = mx.array([5.0, 1.0, 1.0, 1.0, 0.0])
    assert [t.token for t in read(unequal, 3, 2).top] == [0, 3]
    assert [t.token for t in read(unequal, 4, 4).top] == [0, 1, 2, 3]


def test_more_than_the_vocabulary_holds_is_the_vocabulary() -> None:
    got = read(mx.array([0.0, 1.0]), 0, 20)
    assert [t.token for t in got.top] == [1, 0]
    assert sum(np.exp(t.logprob) for t in got.top) == pytest.approx(1)


def test_what_is_impossible_is_still_json() -> None:
    got = read(mx.array([0.0, -float("inf"), -float("inf")]), 1, 3)
    assert (got.logprob, got.top[0].logprob, got.top[1].token) == (LOWEST, 0.0, 1)
    json.dumps([got.logprob, *(t.logprob for t in got.top)], allow_nan=False)
