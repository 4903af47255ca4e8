"""Every layer attends to every token, and a router chooses among experts."""

from __future__ import annotations

from typing import Any

from agentmem.model.zoo.parts import EXPERTS, ROUTED, SCALED

SHARED: dict[str, Any] = EXPERTS | {
    "num_shared_experts": 1, "norm_topk_prob": True, "first_k_dense_replace": 1, "num_hidden_layers": 3,
    "n_group": 2, "topk_group": 1,
}  # fmt: skip
MOE: dict[str, dict[str, Any]] = {
    "Klear": EXPERTS | {
        "attention_bias": False, "mlp_only_layers": [0], "decoder_sparse_step": 1, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_hidden_layers": 3,
    },
    "bailing_moe": SHARED | {"use_qk_norm": True},
    "dbrx": {
        "d_model": 128, "n_layers": 2, "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": ROUTED,
    "dots1": ROUTED | {"scoring_func": "noaux_tc"},
    "ernie4_5_moe": {
        "use_bias": False, "moe_num_experts": 4, "moe_layer_start_index": 1, "moe_intermediate_size": 64, "moe_k": 2,
        "moe_num_shared_experts": 1, "num_hidden_layers": 3,
    },
    "glm4_moe": ROUTED | {
        "rope_scaling": None, "use_qk_norm": True, "attention_bias": False, "partial_rotary_factor": 0.5,
    },
    "granitemoe": SCALED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan": EXPERTS | {
        "attention_bias": False, "moe_topk": 2, "num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_qk_norm": True,
        "use_cla": True, "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1.0, "factor": 1.0}, "num_hidden_layers": 4,
    },
    "llama4_text": {
        "intermediate_size_mlp": 256, "no_rope_layers": [1, 0, 1, 0], "use_qk_norm": True, "num_hidden_layers": 4,
    },
    "minimax": {
        "num_experts_per_tok": 2, "num_local_experts": 4, "shared_intermediate_size": 64, "rotary_dim": 32,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {
        "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_scaling": {
            "type": "longrope", "long_factor": [1.0] * 16, "short_factor": [1.0] * 16, "long_mscale": 1.0,
            "short_mscale": 1.0,
        },
    },
    "phixtral": {
        "num_vocab": 258, "model_dim": 128, "num_heads": 2, "num_layers": 2, "rotary_dim": 32,
        "num_experts_per_tok": 2, "num_local_experts": 4,
    },
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": EXPERTS | {
        "decoder_sparse_step": 1, "mlp_only_layers": [0], "norm_topk_prob": True, "num_hidden_layers": 3,
    },
    "solar_open": ROUTED | {
        "rope_scaling": None, "use_qk_norm": False, "attention_bias": False, "partial_rotary_factor": 1.0,
    },
}  # fmt: skip
