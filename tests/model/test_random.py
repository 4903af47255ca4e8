"""Random models: repeatable, quick to make, and sensitive to their context."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from agentmem.errors import ModelUnavailable
from agentmem.model.loaded import LoadedModel
from agentmem.model.random import SHAPES, random_model, shape_model

TOKENS = mx.array([list(b"The same tokens every time.")])


def _reply(loaded: LoadedModel, text: str, limit: int = 40) -> list[int]:
    cache = make_prompt_cache(loaded.model)
    ids = loaded.tokenizer.encode(text)
    reply: list[int] = []
    for _ in range(limit):
        reply.append(int(loaded.model(mx.array([ids]), cache=cache)[0, -1].argmax()))
        ids = reply[-1:]
    return reply


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "olmo2", "mixtral"])
def test_seed_decides_the_model(architecture: str) -> None:
    one, same, other = (random_model(architecture, seed=seed) for seed in (1, 1, 2))
    assert mx.array_equal(one.model(TOKENS), same.model(TOKENS))
    assert not mx.allclose(one.model(TOKENS), other.model(TOKENS), atol=0.1)
    assert one.identity == same.identity
    assert one.identity["weights"] != other.identity["weights"]
    assert one.identity["rope"] == other.identity["rope"]


def test_overrides_reach_the_architecture() -> None:
    made = random_model(
        "llama", seed=1, num_hidden_layers=3, num_key_value_heads=1, max_position_embeddings=100
    )
    assert len(made.model.layers) == 3
    assert made.model.layers[0].self_attn.k_proj.weight.shape == (64, 128)
    assert made.max_context == 100


def test_next_token_depends_on_the_first() -> None:
    made = random_model("llama", seed=1)
    tail = " and the rest of this prompt does not differ at all"
    assert _reply(made, "a" + tail) != _reply(made, "b" + tail)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_reply_survives_being_sent_back_as_text(seed: int) -> None:
    made = random_model("qwen3", seed=seed)
    reply = _reply(made, made.tokenizer.render([{"role": "user", "content": "hello"}]))
    assert made.tokenizer.encode(made.tokenizer.decode(reply)) == reply


def test_bytes_are_their_own_ids() -> None:
    tokenizer = random_model("llama", seed=1).tokenizer
    assert tokenizer.encode("aé\n") == list("aé\n".encode())
    assert tokenizer.eos_ids == {257}
    assert tokenizer.special == {256: "<|im_start|>", 257: "<|im_end|>"}


@pytest.mark.slow
def test_full_size_shape_is_repeatable_and_tame() -> None:
    made, same = shape_model("smollm2-135m"), shape_model("smollm2-135m")
    logits = made.model(TOKENS)
    assert logits.shape == (1, TOKENS.shape[1], 49152)
    assert mx.isfinite(logits).all()
    assert mx.array_equal(logits, same.model(TOKENS))
    named: list[Any] = list(tree_flatten(made.model.parameters()))
    if made.dtype == mx.float32:
        assert sum(weight.size for _, weight in named) == 134_515_008


def test_packed_output_layer_says_printable_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 128, "vocab_size": 512}
    monkeypatch.setitem(SHAPES, "small", SHAPES["llama-3.1-8b"] | small)
    reply = _reply(shape_model("small"), "hello", 60)
    assert all(token in range(0x20, 0x7F) for token in reply)


def test_every_shape_groups_its_heads() -> None:
    for shape in SHAPES.values():
        assert shape["num_attention_heads"] % shape["num_key_value_heads"] == 0


@pytest.mark.parametrize("make", [lambda: shape_model("gpt-9"), lambda: random_model("gpt-9", seed=0)])
def test_unknown_names_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ModelUnavailable, match="gpt-9"):
        make()
