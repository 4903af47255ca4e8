"""Logits of the rows that need them, whatever the model is made of."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from agentmem.model.network import Network
from agentmem.model.random import random_model

IDS = mx.array([[1, 2, 3, 4], [5, 6, 7, 8]])


class Scaled(nn.Module):
    """A model whose logits are more than its head makes of its body's output."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.model, self.lm_head = inner, inner.model, getattr(inner, "lm_head", None)
        self.layers = inner.layers

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        return 0.5 * self.inner(ids, cache=cache)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_head_is_found_and_gives_the_models_logits(kind: str, tied: bool) -> None:
    model = random_model(kind, seed=1, tie_word_embeddings=tied).model
    network = Network(model)
    assert network.splits
    _check(network, model)


def test_a_model_that_does_more_makes_all_logits() -> None:
    model = Scaled(random_model("llama", seed=1).model)
    network = Network(model)
    assert not network.splits
    _check(network, model)


def _check(network: Network, model: Any) -> None:
    want = np.array(model(IDS, cache=make_prompt_cache(model))).reshape(8, -1)
    for rows in ([0], [3, 7], [5, 2], list(range(8))):
        got = np.array(network.logits(IDS, make_prompt_cache(model), rows))
        np.testing.assert_allclose(got, want[rows], rtol=1e-5, atol=1e-5)


def test_a_pass_without_rows_fills_the_cache() -> None:
    model = random_model("llama", seed=1).model
    cache = make_prompt_cache(model)
    assert Network(model).logits(IDS, cache, []).shape[0] == 0
    whole = make_prompt_cache(model)
    mx.eval(model(IDS, cache=whole))
    assert all(mx.array_equal(a.keys, b.keys).item() for a, b in zip(cache, whole, strict=True))
