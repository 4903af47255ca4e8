"""The sampler chooses what the request's sampling settings say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agentmem.engine.request import Sampling
from agentmem.engine.sampler import Sampler, choose_batch

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
        ({"top_p": 1e-40}, {0}),
        ({"top_p": 0.99999999}, {0, 1, 2, 3, 4}),
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


def test_the_repetition_penalty_divides_what_speaks_for_the_prompt_and_the_reply() -> None:
    logits = mx.array([2.0, 1.5, -1.0, -1.5])
    s = Sampler(Sampling(repetition_penalty=2.0), 0, prompt=[0, 0])
    assert choice(s, logits, 0) == 1, "once is as good as twice: 2.0 became 1.0"
    s.saw(1)
    assert choice(s, logits, 1) == 0, "1.5 became 0.75"
    s.saw(0)
    assert choice(s, logits, 2) == 0
    below_zero = Sampler(Sampling(repetition_penalty=2.0), 0, prompt=[0, 1, 2])
    assert choice(below_zero, mx.array([-1.0, -1.2, -1.1, -1.9]), 0) == 3
    assert choice(Sampler(Sampling(repetition_penalty=2.0), 0), logits, 0) == 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9, 1e-5, 1e-3])
def test_the_lowest_temperatures_choose_the_likeliest(temperature: float) -> None:
    assert set(draw(50, temperature=temperature)) == {0}


def test_siblings_have_seeds_of_their_own() -> None:
    def tokens(s: Sampler) -> list[int]:
        return [choice(s, LOGITS, i) for i in range(40)]

    s = sampler(temperature=1.0, seed=7)
    texts = [tokens(s), *(tokens(s.sibling(i)) for i in range(1, 8))]
    assert len({tuple(t) for t in texts}) == 8
    assert tokens(sampler(99, temperature=1.0, seed=7).sibling(3)) == texts[3]
    assert tokens(sampler(temperature=1.0, seed=8)) not in texts
    greedy = sampler(logit_bias={3: 100.0})
    assert tokens(greedy.sibling(1)) == tokens(greedy)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.0, "temperature": 1.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 4, "top_p": 0.8},
    {"temperature": 1.3, "seed": 5, "top_k": 7},
    {"temperature": 1.0, "seed": 6, "min_p": 0.05},
    {"temperature": 0.9, "seed": 7, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    {"frequency_penalty": 1.5},
    {"presence_penalty": -2.0, "temperature": 1.0},
    {"repetition_penalty": 1.8},
    {"logit_bias": {5: 30.0, 6: -100.0}},
    {},
]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [SETTINGS, [{}] * 5, SETTINGS[2:7], SETTINGS[:1]], ids=len)
def test_a_batch_chooses_what_each_sequence_would_choose_alone(
    settings: list[dict[str, Any]], dtype: mx.Dtype
) -> None:
    def samplers() -> list[Sampler]:
        return [Sampler(Sampling(**s), own, prompt=[own, 9]) for own, s in enumerate(settings)]

    rng = np.random.default_rng(len(settings))
    together, alone = samplers(), samplers()
    said = set()
    for step in range(12):
        logits = mx.array(rng.normal(size=(len(settings), 64)).astype(np.float32) * 2).astype(dtype)
        positions = [step + 3 * i for i in range(len(settings))]
        tokens = np.array(choose_batch(together, logits, positions)).tolist()
        assert tokens == [choice(s, logits[i], positions[i]) for i, s in enumerate(alone)]
        for s, other, token in zip(together, alone, tokens, strict=True):
            s.saw(token)
            other.saw(token)
        said.add(tuple(tokens))
    assert len(said) > 1


def test_who_else_is_in_the_batch_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    logits = mx.array(rng.normal(size=(len(SETTINGS), 64)).astype(np.float32))

    def chosen(order: list[int]) -> dict[int, int]:
        samplers = [sampler(i, **SETTINGS[i]) for i in order]
        tokens = choose_batch(samplers, logits[mx.array(order)], [i + 2 for i in order])
        return dict(zip(order, np.array(tokens).tolist(), strict=True))

    whole = chosen(list(range(len(SETTINGS))))
    for _ in range(20):
        some = rng.permutation(len(SETTINGS))[: rng.integers(1, len(SETTINGS))].tolist()
        assert chosen(some).items() <= whole.items()


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = mx.array([8.0, 8.0625], dtype=mx.bfloat16)
    assert choice(sampler(logit_bias={0: 0.0635}), logits, 0) == 0
