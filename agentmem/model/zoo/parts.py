"""Settings that several architectures have in common."""

from __future__ import annotations

from typing import Any

WINDOW = 96
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"

LATENT: dict[str, Any] = {
    "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
    "num_key_value_heads": 4,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.0,
    "norm_topk_prob": True, "num_hidden_layers": 3,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
NO_BIAS: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
SCALED: dict[str, Any] = {
    "logits_scaling": 1.0, "attention_multiplier": 0.125, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5, "full_attention_interval": 2, "num_hidden_layers": 4,
}  # fmt: skip
