"""The sampler chooses what the request's sampling settings say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agentmem.engine.request import Sampling
from agentmem.engine.sampler import Sampler

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
LOGITS = mx.array(np.log(PROBABILITIES).astype(np.float32))
DRAWS = 1500


def sampler(own_seed: int = 0, **options: Any) -> Sampler:
    return Sampler(Sampling(**options), own_seed)


def choice(s: Sampler, logits: mx.array, position: int) -> int:
    return int(np.array(s.choose(logits, position)))


def draw(n: int = DRAWS, **options: Any) -> Counter[int]:
    """How often each token is chosen at the first `n` positions."""
    s = sampler(**{"temperature": 1.0, "seed": 11, **options})
    tokens = [s.choose(LOGITS, i) for i in range(n)]
    mx.eval(tokens)
    return Counter(int(np.array(t)) for t in tokens)


def test_temperature_zero_is_greedy() -> None:
    s = sampler()
    assert [choice(s, mx.array([0.1, 3.0, 2.9]), i) for i in range(5)] == [1] * 5


def test_the_choice_depends_on_seed_and_position_only() -> None:
    def tokens(seed: int, request_seed: int | None) -> list[int]:
        s = sampler(seed, temperature=1.0, seed=request_seed)
        return [choice(s, LOGITS, i) for i in range(40)]

    assert tokens(1, 7) == tokens(2, 7)
    assert tokens(1, 7) != tokens(1, 8)
    assert tokens(1, None) == tokens(1, None)
    assert tokens(1, None) != tokens(2, None)
    s = sampler(temperature=1.0, seed=7)
    assert [choice(s, LOGITS, i) for i in reversed(range(40))] == tokens(0, 7)[::-1]
    assert len(set(tokens(1, 7))) > 1


@pytest.mark.parametrize("seed", [0, (1 << 64) - 1, -1])
def test_any_seed_works(seed: int) -> None:
    assert 0 <= choice(sampler(temperature=1.0, seed=seed), LOGITS, 3) < 5


def test_temperature_one_draws_the_models_distribution() -> None:
    counts = draw()
    for token, p in enumerate(PROBABILITIES):
        assert abs(counts[token] / DRAWS - p) < 5 * (p * (1 - p) / DRAWS) ** 0.5


def test_low_temperature_sharpens_and_high_flattens() -> None:
    assert draw(temperature=0.3)[0] > draw(temperature=1.0)[0] > draw(temperature=2.0)[0]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 500}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.45}, {0}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.0}, {0}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 0.9}, {0}),
        ({"top_p": 0.95, "top_k": 2}, {0, 1}),
        ({"top_p": 0.6, "temperature": 2.0}, {0, 1}),
    ],
)
def test_filters_leave_exactly_the_likely_tokens(options: dict[str, float], allowed: set[int]) -> None:
    assert set(draw(400, **options)) == allowed


def test_logit_bias_is_added() -> None:
    assert set(draw(100, logit_bias={4: 100.0})) == {4}
    assert 0 not in draw(200, logit_bias={0: -100.0})
    assert choice(sampler(logit_bias={3: 100.0}), LOGITS, 0) == 3


@pytest.mark.parametrize("token", [5, 999_999_999, -1])
def test_bias_on_a_token_that_does_not_exist_touches_nothing(token: int) -> None:
    s = sampler(logit_bias={token: 100.0})
    assert [choice(s, LOGITS, i) for i in range(50)] == [0] * 50


def test_penalties_count_the_reply() -> None:
    s = sampler(frequency_penalty=1.0)
    logits = mx.array([1.0, 0.0, -5.0])
    chosen = []
    for i in range(6):
        token = choice(s, logits, i)
        chosen.append(token)
        s.saw(token)
    assert chosen[0] == 0
    assert chosen.count(1) >= 2
    assert 2 not in chosen
    present = sampler(presence_penalty=1.5)
    present.saw(0)
    present.saw(0)
    assert choice(present, logits, 1) == 1
    weak = sampler(presence_penalty=0.5)
    for _ in range(10):
        weak.saw(0)
    assert choice(weak, logits, 1) == 0, "presence does not count how often"


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = mx.array([8.0, 8.0625], dtype=mx.bfloat16)
    assert choice(sampler(logit_bias={0: 0.0635}), logits, 0) == 0
