"""Every layer attends to every token."""

from __future__ import annotations

from typing import Any

from agentmem.model.zoo.parts import NO_BIAS, SCALED

DENSE: dict[str, dict[str, Any]] = {
    "afm7": {
        "hidden_dim": 128, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 2, "num_kv_heads": 1,
        "hidden_dim_scale_factor": 2.0,
    },
    "apertus": NO_BIAS | {"post_norm": False, "qk_norm": True},
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 1.0},
    "ernie4_5": {"use_bias": False},
    "exaone": {"head_dim": 32, "num_layers": 2, "layer_norm_epsilon": 1e-5},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 64.0},
    "glm": {},
    "glm4": {"attention_bias": False, "partial_rotary_factor": 0.5},
    "gpt2": {
        "n_ctx": 8192, "n_embd": 128, "n_head": 2, "n_layer": 2, "n_positions": 8192, "layer_norm_epsilon": 1e-5,
        "num_key_value_heads": None,
    },
    "gpt_bigcode": {
        "n_embd": 128, "n_layer": 2, "n_inner": 256, "n_head": 2, "n_positions": 8192, "layer_norm_epsilon": 1e-5,
        "num_key_value_heads": None,
    },
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5, "num_key_value_heads": 4},
    "gptj": {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 8192, "rotary_dim": 32},
    "granite": SCALED,
    "helium": NO_BIAS,
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "lille-130m": {
        "block_size": 8192, "layer_norm_eps": 1e-5, "n_embd": 128, "n_head": 2, "n_kv_heads": 1, "n_layer": 2,
    },
    "llama": {},
    "mimo": {},
    "minicpm": {"dim_model_base": 128, "scale_depth": 1.4, "scale_emb": 1.0},
    "nanbeige": {"num_loops": 2},
    "nanochat": {"num_key_value_heads": 2},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5},
    "nemotron-nas": {
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    },
    "olmo2": {},
    "openelm": {
        "num_transformer_layers": 2, "model_dim": 128, "ffn_dim_divisor": 64, "num_query_heads": [4, 4],
        "num_kv_heads": [2, 1], "ffn_multipliers": [1.0, 2.0],
    },
    "phi": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "phi3": {},
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 32, "layer_norm_epsilon": 1e-5},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "stablelm": {"use_qkv_bias": False, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "starcoder2": {},
    "talkie": {},
    "telechat3": {},
}  # fmt: skip
