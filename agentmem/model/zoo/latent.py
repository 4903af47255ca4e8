"""Layers that keep a compressed key and a rotary one (multi-head latent attention)."""

from __future__ import annotations

from typing import Any

from agentmem.model.zoo.parts import LATENT, NO_BIAS, ROUTED, WINDOW

INDEXED: dict[str, Any] = {"index_head_dim": 64, "index_n_heads": 2, "index_topk": 32}
YARN: dict[str, Any] = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
LONG: dict[str, Any] = {
    "type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.0] * 16,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SCALED_QUERIES: dict[str, Any] = {
    "rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8192,
}  # fmt: skip
FLASH: dict[str, Any] = LATENT | {
    "ffn_hidden_size": 256, "moe_topk": 2, "expert_ffn_hidden_size": 64, "n_routed_experts": 4, "zero_expert_num": 2,
    "num_layers": 2, "routed_scaling_factor": 1.0, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    "attention_bias": False, "attention_method": "MLA", "zero_expert_type": "identity",
}  # fmt: skip
MLA: dict[str, dict[str, Any]] = {
    "deepseek_v41": {
        "num_hidden_layers": 4, "q_lora_rank": 64, "qk_rope_head_dim": 32, "o_groups": 2, "o_lora_rank": 64,
        "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6,
        "sliding_window": WINDOW, "compress_ratios": [0, 4, 4, 4], "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1, 3], "candidate_source_layer_id": 1, "candidate_topk_blocks": 2,
        "candidate_block_size": 2, "index_n_heads": 2, "index_head_dim": 64, "index_topk": 32, "hc_mult": 2,
    },
    "deepseek_v2": LATENT | ROUTED | {"topk_method": "group_limited_greedy", "rope_scaling": YARN},
    "deepseek_v3": LATENT | ROUTED,
    "deepseek_v32": LATENT | ROUTED | INDEXED,
    "glm4_moe_lite": LATENT | ROUTED,
    "glm_moe_dsa": LATENT | ROUTED | INDEXED | {
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "longcat_flash": FLASH,
    "longcat_flash_ngram": FLASH | {"ngram_vocab_size_ratio": 4},
    "minicpm3": LATENT | {"rope_scaling": LONG, "dim_model_base": 128, "scale_depth": 1.4, "scale_emb": 1.0},
    "mistral4": LATENT | ROUTED | {"head_dim": None, "n_group": 1, "rope_parameters": SCALED_QUERIES},
    "youtu_llm": LATENT | NO_BIAS,
}  # fmt: skip
