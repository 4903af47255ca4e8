"""Some layers look back at the last tokens only."""

from __future__ import annotations

from typing import Any

from agentmem.model.zoo.parts import EXPERTS, FULL, SLIDING, WINDOW

LAYERS: dict[str, Any] = {
    "sliding_window": WINDOW, "num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL],
}  # fmt: skip
PATTERN: dict[str, Any] = {"sliding_window": WINDOW, "num_hidden_layers": 4, "sliding_window_pattern": 2}
ROPES: dict[str, Any] = {
    kind: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    for kind in (SLIDING, FULL)
}
GEMMA4: dict[str, Any] = PATTERN | {
    "global_head_dim": 128, "num_global_key_value_heads": 1, "vocab_size_per_layer_input": 258,
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "enable_moe_block": False, "num_hidden_layers": 6,
    "use_double_wide_mlp": True,
}  # fmt: skip
WINDOWS: dict[str, dict[str, Any]] = {
    "afmoe": LAYERS | EXPERTS | {"num_shared_experts": 1, "num_dense_layers": 1, "route_scale": 1.0},
    "baichuan_m1": {
        "sliding_window": WINDOW, "sliding_window_layers": [0, 2], "conv_window": 2, "num_hidden_layers": 4,
    },
    "cohere2": PATTERN | {"head_dim": 32, "layer_norm_eps": 1e-5, "logit_scale": 1.0},
    "exaone4": PATTERN | {"sliding_window_pattern": "LG", "rope_scaling": None},
    "exaone_moe": LAYERS | EXPERTS | {
        "num_shared_experts": 1, "is_moe_layer": [False, True, True, True], "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    "gemma3_text": PATTERN | {"query_pre_attn_scalar": 64},
    "gemma4_text": GEMMA4,
    "gpt_oss": LAYERS | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "laguna": LAYERS | EXPERTS | {"shared_expert_intermediate_size": 64, "rope_parameters": ROPES},
    "mellum": LAYERS | EXPERTS | {"norm_topk_prob": True, "rope_parameters": ROPES},
    "mimo_v2_flash": {
        "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "hybrid_layer_pattern": [1, 0, 1, 0], "moe_layer_freq": [0, 1, 1, 1], "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "sliding_window_size": WINDOW, "num_hidden_layers": 4,
        "n_shared_experts": None, "n_routed_experts": 4, "routed_scaling_factor": 1.0, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 1, "v_head_dim": 32,
        "swa_head_dim": 64, "swa_v_head_dim": 32, "partial_rotary_factor": 0.5,
    },
    "ministral3": LAYERS | {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8192,
        },
    },
    "muse_glimmer": LAYERS,
    "olmo3": LAYERS,
    "plamo3": PATTERN,
    "spark2_5": LAYERS | {"rope_parameters": ROPES},
    "step3p5": LAYERS | {
        "num_attention_groups": 2, "moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 64,
        "share_expert_dim": 64, "moe_layers_enum": "1,2,3", "moe_router_scaling_factor": 1.0,
        "attention_other_setting": {"num_attention_heads": 2, "num_attention_groups": 1, "head_dim": 64},
    },
}  # fmt: skip
GEMMA3N: dict[str, Any] = LAYERS | {
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 258, "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": 30.0, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 32, "altup_num_inputs": 2, "altup_coef_clip": 120.0, "altup_correct_scale": True,
    "altup_active_idx": 0, "laurel_rank": 32, "intermediate_size": [256] * 6, "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL] * 3,
}  # fmt: skip
