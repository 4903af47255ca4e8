"""Models with random weights: tiny ones for tests, full-size shapes for benches."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agentmem.errors import ModelUnavailable
from agentmem.model.chat import ChatTokenizer
from agentmem.model.folder import for_device
from agentmem.model.identity import digest, rope_part
from agentmem.model.loaded import LoadedModel

START, END = "<|im_start|>", "<|im_end|>"
BYTES = 256
PRINTABLE = range(0x20, 0x7F)
GROUP = 64
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": BYTES + 2,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# Drawn around 0 like a bias, these would shut a path or make a layer forget within a few tokens.
MIDDLES: dict[str, float] = {
    "a_g": 1.0, "w_g": 1.0, "head_g": 1.0, "layer_scalar": 1.0, "correct_output_scale": 1.0,
    "scale": 1.0, "q_weight": 1.0, "k_weight": 1.0, "recurrent_param": -3.0,
    "x_r": 0.5, "x_w": 0.5, "x_k": 0.5, "x_v": 0.5, "x_a": 0.5, "x_g": 0.5,
}  # fmt: skip
DECAY_BIAS = "w_lora.lora.2.bias"
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
}


@cache
def byte_tokenizer() -> ChatTokenizer:
    """One token a byte (ids 0-255 are the bytes), then the two special tokens of its ChatML template."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = sorted(char for char in alphabet if ord(char) < BYTES)
    shifted = sorted(char for char in alphabet if ord(char) >= BYTES)
    others = [byte for byte in range(BYTES) if chr(byte) not in printable]
    vocab = {char: ord(char) for char in printable} | dict(zip(shifted, others, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (START, END)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=CHATML)
    return ChatTokenizer(TokenizerWrapper(fast))


def random_model(architecture: str, *, seed: int, **overrides: Any) -> LoadedModel:
    """A tiny float32 model of one of mlx-lm's architectures ("llama", "qwen3"), the same for the same seed.

    `overrides` go into the architecture's ModelArgs. Greedy replies are printable ASCII (unless the output
    layer is tied to the embeddings), so a reply that a client sends back becomes the same ids again.
    """
    config = TINY | {"model_type": architecture} | overrides
    model = _empty(deepcopy(config))  # some of mlx-lm's arguments edit the dictionaries they are made from
    named: list[Any] = list(tree_flatten(model.parameters()))
    keys = mx.random.split(mx.random.key(seed), len(named))
    weights = [(name, _random_weight(name, old, key)) for (name, old), key in zip(named, keys, strict=True)]
    model.update(tree_unflatten([(name, _readable(name, weight)) for name, weight in weights]))
    mx.eval(model.parameters())
    return _loaded(f"random-{architecture}-{seed}", model, mx.float32, config, seed)


def shape_model(shape: str, *, bits: int = 4, seed: int = 0) -> LoadedModel:
    """A full-size model of a shape in `SHAPES`, random weights of `bits` (4, 8, or 16 for plain bfloat16).

    Packed weights are drawn as such, layer by layer on the device: the unpacked model never exists there. Greedy replies of
    a model with a packed output layer of its own are printable ASCII, and end when they are cut.
    """
    if shape not in SHAPES:
        raise ModelUnavailable(f"There is no shape {shape!r}; there are {', '.join(SHAPES)}")
    config = SHAPES[shape]
    model = _empty(config)
    model.set_dtype(mx.bfloat16)
    if bits < 16:
        nn.quantize(model, GROUP, bits)
    leaves: list[Any] = list(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    for (name, module), key in zip(leaves, mx.random.split(mx.random.key(seed), len(leaves)), strict=True):
        module.update(_random_leaf(name, module, key))
        mx.eval(module.parameters())
    model, dtype = for_device(model)
    name = shape if bits == 4 else f"{shape}-{bits}bit"
    return _loaded(name, model, dtype, config | {"bits": bits}, seed)


def _empty(config: dict[str, Any]) -> nn.Module:
    """The model with its first weights still unevaluated: replaced, they cost nothing."""
    try:
        model_class, args_class = _get_classes(config)
    except ValueError as error:
        raise ModelUnavailable(str(error)) from error
    model = model_class(args_class.from_dict(config))
    model.eval()
    return model


def _loaded(name: str, model: nn.Module, dtype: mx.Dtype, config: dict[str, Any], seed: int) -> LoadedModel:
    tokenizer = byte_tokenizer()
    identity = {
        "weights": digest(["random", seed, config]),
        "config": digest(config),
        "tokenizer": digest(["bytes", tokenizer.special]),
        "chat_template": digest(tokenizer.chat_template),
        "rope": digest(rope_part(config)),
    }
    return LoadedModel(name, model, tokenizer, identity, dtype, config["max_position_embeddings"])


def _random_weight(name: str, old: mx.array, key: mx.array) -> mx.array:
    """Weights large enough that attention is not uniform: a wrong cache then changes the next token."""
    noise = mx.random.normal(old.shape, key=key)
    middle = MIDDLES.get(name.rpartition(".")[2])
    if name.endswith(DECAY_BIAS):
        middle = -3.0
    if middle is not None:
        return middle + 0.1 * noise
    if old.ndim == 0:
        return old
    if old.ndim == 1:
        return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    return noise if "embed" in name else noise / math.sqrt(old.shape[-1])


def _readable(name: str, weight: mx.array) -> mx.array:
    """The output layer without rows that would make a greedy reply something else than printable text."""
    if not name.endswith("lm_head.weight"):
        return weight
    allowed = mx.array([[number in PRINTABLE or number == BYTES + 1] for number in range(weight.shape[0])])
    return mx.where(allowed, weight, 0.0)


def _random_leaf(name: str, module: nn.Module, key: mx.array) -> dict[str, mx.array]:
    if "scales" not in module:
        return {
            part: _random_weight(f"{name}.{part}", old, key).astype(mx.bfloat16)
            for part, old in module.parameters().items()
        }
    bits, packed = module.bits, module.weight.shape
    columns = packed[-1] * 32 // bits
    codes = mx.random.randint(0, 256, (*packed[:-1], packed[-1] * 4), dtype=mx.uint8, key=key)
    step = math.sqrt(12) / (2**bits * math.sqrt(columns))  # codes are uniform: a variance of 1 / columns
    scales = mx.full(module.scales.shape, step, dtype=mx.bfloat16)
    if name.endswith("lm_head"):
        scales = mx.where(
            mx.array([[number in PRINTABLE] for number in range(packed[0])]), scales, mx.zeros_like(scales)
        )
    return {"weight": codes.view(mx.uint32), "scales": scales, "biases": scales * (-(2**bits - 1) / 2)}
