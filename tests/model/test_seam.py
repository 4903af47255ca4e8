"""Our attention inside mlx-lm's models, family by family, against mlx-lm's own cache."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.pool import Pool
from agentmem.engine.table import Table
from agentmem.errors import ModelUnavailable
from agentmem.model import seam
from agentmem.model.anatomy import anatomy
from agentmem.model.random import random_model
from agentmem.quant.attention import reference_path
from agentmem.quant.format import LayerShape, kv_format
from agentmem.quant.rows import RowCodec

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"hidden_size": 256, "rope_scaling": None},
    "olmo2": {"hidden_size": 256},
    "mixtral": {"hidden_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2},
}
CHUNKS = (50, 64, 1, 33, 128, 1, 1, 7)


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return random_model(request.param, seed=3, **FAMILIES[request.param]).model


def paged_logits(model: nn.Module, tokens: list[int], format: str) -> tuple[np.ndarray, Pool]:
    """Logits of every token, fed chunk by chunk through a table of our pool."""
    seam.install(model)
    shapes = anatomy(model).shapes
    codecs = tuple(RowCodec(s, kv_format(format).for_shape(s), mx.float16) for s in shapes)
    pool = Pool(Geometry(codecs, 64), 8 << 20, "fingerprint")
    table, out, at = Table(pool, reference_path), [], 0
    for n in CHUNKS:
        views = table.views()
        logits = model(mx.array([tokens[at : at + n]]), cache=views)
        arrays, apply = table.absorb(views, tokens[at : at + n])
        mx.eval(logits, *arrays)
        apply()
        out.append(np.array(logits[0].astype(mx.float32)))
        at += n
        assert len(table) == at
    return np.concatenate(out), pool


def own_logits(model: nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits of every token through mlx-lm's own cache, with the same chunks."""
    cache, out, at = make_prompt_cache(model), [], 0
    for n in CHUNKS:
        logits = model(mx.array([tokens[at : at + n]]), cache=cache)
        mx.eval(logits)
        out.append(np.array(logits[0].astype(mx.float32)))
        at += n
    return np.concatenate(out)


def tokens() -> list[int]:
    return [int(t) for t in np.random.default_rng(5).integers(32, 127, sum(CHUNKS))]


def test_pages_without_packing_give_the_models_own_logits(model: nn.Module) -> None:
    """What differs is that stored keys and values are rounded to 16 bits."""
    ids = tokens()
    ours, _ = paged_logits(model, ids, "fp16")
    own = own_logits(model, ids)
    assert own.std() > 0.3
    assert np.abs(ours - own).max() < 2e-2
    assert np.abs(ours[: CHUNKS[0]] - own[: CHUNKS[0]]).max() < 1e-4, "the first chunk attends to itself only"


def test_packed_pages_stay_near_the_models_own_logits(model: nn.Module) -> None:
    ids = tokens()
    ours, pool = paged_logits(model, ids, "q8-plain")
    own = own_logits(model, ids)
    assert np.sqrt(((ours - own) ** 2).mean()) < 0.1 * own.std()
    assert pool.slots.free < pool.slots.count


def test_a_wrong_history_would_show(model: nn.Module) -> None:
    """The bound of the comparison above is far below what one other token changes."""
    ids = tokens()
    own = own_logits(model, ids)
    other = own_logits(model, [ids[0] ^ 3, *ids[1:]])
    assert np.abs(own[-1] - other[-1]).max() > 2e-2


def test_install_leaves_mlx_lms_own_cache_alone(model: nn.Module) -> None:
    ids = tokens()
    before = own_logits(model, ids)
    seam.install(model)
    seam.install(model)
    assert np.array_equal(own_logits(model, ids), before)


def test_probe_tells_the_geometry() -> None:
    model = random_model("llama", seed=0, num_hidden_layers=3).model
    seam.install(model)
    found = anatomy(model)
    assert (found.shapes, found.query_heads, found.dtype) == ([LayerShape(2, 64, 64)] * 3, 4, mx.float32)
    assert found.plain


def test_another_attention_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(queries: Any, keys: Any, values: Any, *rest: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(seam, "_original", changed)
    with pytest.raises(ModelUnavailable, match=r"install mlx-lm 0\.32"):
        seam.install(random_model("llama", seed=0).model)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_pass_may_begin_at_different_positions(family: str) -> None:
    model = random_model(family, seed=0, **FAMILIES[family]).model
    seam.install(model)
    assert seam.takes_ragged_rows(model)


def test_a_model_that_puts_all_rows_at_one_position_is_noticed() -> None:
    model = random_model("llama", seed=0).model
    seam.install(model)
    rope = model.layers[0].self_attn.rope

    class First(nn.Module):
        def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
            return rope(x, offset=offset if isinstance(offset, int) else offset[:1])

    model.layers[0].self_attn.rope = First()
    assert not seam.takes_ragged_rows(model)
