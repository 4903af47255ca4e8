"""Tiny models of every kind of layer, and what `random_model` needs to make them."""

from __future__ import annotations

from typing import Any

import pytest

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": (
        "gemma3_text",
        {
            "sliding_window": 96, "sliding_window_pattern": 2, "num_hidden_layers": 4, "query_pre_attn_scalar": 64,
            "rope_global_base_freq": 10000.0, "rope_local_base_freq": 10000.0,
        },
    ),
    "recurrent": (
        "mamba2",
        {
            "num_heads": 8, "head_dim": 32, "state_size": 32, "conv_kernel": 4, "n_groups": 1, "use_bias": False,
            "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "time_step_limit": (0.001, 100.0),
            "time_step_rank": "auto", "chunk_size": 64, "rms_norm": True,
        },
    ),
    "sinks": (
        "gpt_oss",
        {"sliding_window": 40, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "hybrid": (
        "qwen3_next",
        {
            "num_hidden_layers": 4, "full_attention_interval": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "num_experts": 4,
            "num_experts_per_tok": 2, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 64, "mlp_only_layers": [],
            "moe_intermediate_size": 64, "partial_rotary_factor": 0.5,
        },
    ),
    "both in one layer": (
        "falcon_h1",
        {
            "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 32, "mamba_n_heads": 4, "mamba_chunk_size": 64,
            "lm_head_multiplier": 1.0,
        },
    ),
    "latent of heads": (
        "deepseek_v2",
        {
            "num_hidden_layers": 3, "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
            "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
            "rope_scaling": {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7, "original_max_position_embeddings": 2048},
        },
    ),
    "latent": (
        "deepseek_v3",
        {
            "num_hidden_layers": 3, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
            "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "moe_intermediate_size": 64, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "routed_scaling_factor": 1.0,
        },
    ),
}  # fmt: skip


QUICK = ("window", "hybrid", "latent")
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in LAYOUTS]
"""For tests of all kinds."""
CARRIED = [k for k, name in zip(KINDS, LAYOUTS, strict=True) if not name.startswith("latent")]
"""For tests of those that carry state along."""
