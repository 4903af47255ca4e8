"""Text models inside of others that also see images."""

from __future__ import annotations

from typing import Any

from agentmem.model.random import TINY
from agentmem.model.zoo.dense import DENSE
from agentmem.model.zoo.experts import MOE
from agentmem.model.zoo.hybrid import HYBRIDS, KDA
from agentmem.model.zoo.latent import MLA
from agentmem.model.zoo.parts import EXPERTS, LATENT
from agentmem.model.zoo.windows import GEMMA3N, WINDOWS


def inside(text: str, overrides: dict[str, Any], **outside: Any) -> dict[str, Any]:
    """Overrides of a model whose `text_config` is that of the architecture `text`."""
    return outside | {"text_config": TINY | {"model_type": text} | overrides}


WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": inside("gemma3_text", WINDOWS["gemma3_text"]),
    "gemma3n": inside("gemma3n_text", GEMMA3N),
    "gemma4": inside("gemma4_text", WINDOWS["gemma4_text"]),
    "kimi_k25": inside("deepseek_v3", MLA["deepseek_v3"]),
    "kimi_k3": inside(
        "kimi_linear",
        LATENT | EXPERTS | {
            "num_hidden_layers": 4, "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
            "num_expert_group": 2, "attn_res_block_size": 2, "mla_use_output_gate": True,
            "linear_attn_config": KDA | {"kda_layers": [1, 3]},
        },
    ),
    "kimi_vl": inside("deepseek_v3", MLA["deepseek_v3"]),
    "lfm2-vl": inside("lfm2", HYBRIDS["lfm2"]),
    "llama4": inside(
        "llama4_text",
        {
            "attention_bias": False, "attention_chunk_size": 96, "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 256, "num_experts_per_tok": 1, "num_local_experts": 4, "rope_scaling": None,
            "use_qk_norm": True, "num_hidden_layers": 4,
        },
    ),
    "minimax_m3_vl": inside(
        "minimax_m3",
        {
            "num_hidden_layers": 3, "intermediate_size": 64, "dense_intermediate_size": 256,
            "shared_intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 2,
            "index_head_dim": 64, "index_block_size": 16, "index_topk_blocks": 4,
            "layer_types": ["full_attention", "sparse", "sparse"], "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "mistral3": inside("ministral3", WINDOWS["ministral3"]),
    "pixtral": inside("mistral", {}),
    "qwen2_vl": inside("qwen2", DENSE["qwen2"]),
    "qwen3_vl": inside("qwen3", DENSE["qwen3"]),
    "qwen3_vl_moe": inside("qwen3_moe", MOE["qwen3_moe"]),
}  # fmt: skip
