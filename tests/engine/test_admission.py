"""Predicted peaks: what they grow with, what they refuse, and that they are what MLX then uses."""

from __future__ import annotations

import gc
from pathlib import Path

import mlx.core as mx
import pytest

from agentmem.engine.admission import Admission, ModelSize, device_bytes, model_size
from agentmem.engine.layout import layout
from agentmem.engine.request import ChatRequest
from agentmem.errors import ContextOverflow, ModelUnavailable
from agentmem.model.random import random_model
from agentmem.runtime import Runtime
from agentmem.settings import Settings
from tests.engine.turns import say

MIB = 1 << 20
WIDE = {
    "hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 1024,
}  # fmt: skip


def admission(limit: int, *, chunk_tokens: int = 256) -> Admission:
    model = random_model("llama", seed=0)
    plan = layout(model, "fp16", 64)
    size = model_size(model.model, plan.geometry, plan.query_heads, plan.dtype)
    return Admission(size, plan.geometry, 8 * MIB, limit, chunk_tokens=chunk_tokens, fused=False, splits=True)


def test_sizes_are_those_of_the_model() -> None:
    model = random_model("qwen3", seed=0, **WIDE)
    plan = layout(model, "fp16", 64)
    size = model_size(model.model, plan.geometry, plan.query_heads, plan.dtype)
    weights = 2 * (3 * 512 * 3072 + 2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 + 2 * 64) + 2 * 1024 * 512 + 512
    assert size == ModelSize(4 * weights, 512, 3072, 1024, 512, 8, 4)


def test_the_device_has_memory() -> None:
    assert device_bytes() > 256 * MIB


def test_more_requests_and_longer_ones_take_more() -> None:
    a = admission(1 << 40)
    assert a.peak([]) == a.standing < a.peak([1])
    sets = [[100], [1000], [4000], [4000, 4000], [4000] * 8, [4000] * 9]
    peaks = [a.peak(s) for s in sets]
    assert peaks == sorted(peaks)
    assert admission(1 << 40, chunk_tokens=64).peak([4000]) < a.peak([4000])


def test_what_fits_alone_may_have_to_wait_beside_others() -> None:
    a = admission(1 << 40)
    a.limit = a.peak([2000, 2000])
    a.check([2000])
    assert a.fits([2000, 2000])
    assert not a.fits([2000] * 9)
    with pytest.raises(ContextOverflow, match=r"20000 tokens .* memory_limit allows"):
        a.check([20_000])


def test_a_model_that_cannot_fit_does_not_start() -> None:
    with pytest.raises(ModelUnavailable, match="Lower ram_budget or chunk_tokens, or raise memory_limit"):
        admission(8 * MIB).start()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        ([1000], {}),
        ([300], {"num_attention_heads": 16, "num_key_value_heads": 2}),
        ([900, 700, 500, 20], {}),
        ([1500], {"intermediate_size": 1024, "hidden_size": 256}),
    ],
)
def test_the_peak_is_what_was_predicted(tmp_path: Path, prompts: list[int], options: dict[str, int]) -> None:
    """Within a tenth, on a model of which a step takes as much as its weights do."""
    gc.collect()
    before = mx.get_active_memory()
    model = random_model("llama", seed=0, **(WIDE | options))
    settings = Settings(home=tmp_path, ram_budget=4 * MIB, chunk_tokens=256, commit="none")
    runtime = Runtime.open(settings, lambda: model)
    mx.reset_peak_memory()
    for i, n in enumerate(prompts):
        say(runtime, ChatRequest(f"a{i}", [{"role": "user", "content": "x" * n}], max_tokens=4))
    peak = mx.get_peak_memory() - before
    whole = len(model.tokenizer.render([{"role": "user", "content": ""}]))
    predicted = runtime._admission.peak([max(prompts) + whole + 4])
    standing = runtime._admission.standing
    runtime.close()
    assert predicted - standing > 0.2 * standing
    assert 0.9 * predicted <= peak <= 1.1 * predicted
