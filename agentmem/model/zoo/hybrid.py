"""Some layers keep a state of constant size."""

from __future__ import annotations

from typing import Any

from agentmem.model.zoo.parts import DELTA, EXPERTS, FULL, LATENT, LINEAR, SCALED, SLIDING, WINDOW

KDA: dict[str, Any] = {"num_heads": 2, "head_dim": 64, "short_conv_kernel_size": 4}
LFM: dict[str, Any] = {
    "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "num_hidden_layers": 4,
    "layer_types": ["conv", FULL, "conv", FULL],
}  # fmt: skip
BAILING: dict[str, Any] = EXPERTS | {
    "num_shared_experts": 1, "norm_topk_prob": True, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "layer_group_size": 2, "group_norm_size": 2, "num_hidden_layers": 4, "use_qk_norm": True,
    "routed_scaling_factor": 1.0,
}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LATENT | BAILING,
    "bailing_moe_linear": BAILING | {"num_key_value_heads": 4},
    "bailing_moe_v3": LATENT | BAILING | {"moe_shared_expert_intermediate_size": 64},
    "falcon_h1": {
        "mamba_chunk_size": 64, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 32, "mamba_n_heads": 4,
        "embedding_multiplier": 1.0, "lm_head_multiplier": 1.0, "key_multiplier": 1.0, "ssm_multipliers": [1.0] * 5,
        "ssm_in_multiplier": 1.0, "ssm_out_multiplier": 1.0,
    },
    "gear": {
        "sliding_window": WINDOW, "num_hidden_layers": 4, "conv_L_cache": 3,
        "layer_types": ["conv_mixer", SLIDING, "conv_mixer", FULL],
    },
    "granitemoehybrid": SCALED | {
        "layer_types": ["mamba", "attention", "mamba", "attention"], "num_hidden_layers": 4, "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 64, "mamba_n_heads": 8, "mamba_d_head": 32,
        "mamba_proj_bias": False, "mamba_d_state": 32, "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True,
    },
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_conv": 4, "mamba_d_state": 32, "mamba_expand": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
    },
    "kimi_linear": LATENT | EXPERTS | {
        "num_hidden_layers": 4, "model_max_length": 8192, "num_experts_per_token": 2, "num_shared_experts": 1,
        "first_k_dense_replace": 1, "num_expert_group": 2,
        "linear_attn_config": KDA | {"kda_layers": [1, 3], "full_attn_layers": [2, 4]},
    },
    "lfm2": LFM | {
        "block_dim": 128, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": LFM | EXPERTS | {"norm_topk_prob": True, "use_expert_bias": True, "num_dense_layers": 1},
    "mamba": {
        "state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": "auto",
    },
    "mamba2": {
        "num_heads": 8, "head_dim": 32, "state_size": 32, "conv_kernel": 4, "n_groups": 1, "use_bias": False,
        "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "time_step_limit": (0.001, 100.0), "time_step_rank": "auto",
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "-", "M", "E"], "attention_bias": False, "mamba_num_heads": 8,
        "mamba_head_dim": 32, "mamba_proj_bias": False, "ssm_state_size": 32, "conv_kernel": 4, "n_groups": 2,
        "mlp_bias": False, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True,
        "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "n_group": 1, "n_routed_experts": 4,
        "n_shared_experts": 1, "topk_group": 1, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    "olmo_hybrid": DELTA | {
        "linear_allow_neg_eigval": True, "attention_bias": False, "layer_types": [LINEAR, FULL, LINEAR, FULL],
    },
    "plamo2": {
        "hidden_size_per_head": 32, "mamba_d_state": 32,
        "mamba_num_heads": 4, "num_hidden_layers": 4,
    },
    "qwen3_5": DELTA,
    "qwen3_5_moe": DELTA | EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3_next": DELTA | EXPERTS | {
        "decoder_sparse_step": 1, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0],
    },
    "recurrent_gemma": {
        "attention_bias": False, "conv1d_width": 4, "logits_soft_cap": 30.0, "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"], "num_key_value_heads": 1, "num_hidden_layers": 4,
    },
    "rwkv7": {
        "norm_eps": 1e-5, "head_dim": 64, "a_low_rank_dim": 32, "v_low_rank_dim": 32, "gate_low_rank_dim": 32,
        "decay_low_rank_dim": 32,
    },
}  # fmt: skip
