"""Multi-head latent attention that keeps its latents (DeepSeek-V2, section 2.1): one compressed key and one rotary key a token.

mlx-lm's DeepSeek V2 unpacks the latent into keys and values of every head before they reach the cache: nine times the bytes.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.deepseek_v2 import DeepseekV2Attention


class LatentAttention(DeepseekV2Attention):
    """The same attention; the cache gets latents [B, 1, n, kv_lora_rank] and rotary keys [B, 1, n, qk_rope_head_dim]."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [B, n, hidden] -> the same shape. `mask` as the model makes it, for keys that are as many as the cache gives."""
        batch, n, _ = x.shape
        q = (
            self.q_proj(x)
            if self.q_lora_rank is None
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )
        q = q.reshape(batch, n, self.num_heads, -1).transpose(0, 2, 1, 3)
        content, turned = mx.split(q, [self.qk_nope_head_dim], axis=-1)
        latent, key = mx.split(self.kv_a_proj_with_mqa(x), [self.kv_lora_rank], axis=-1)
        latent, key = self.kv_a_layernorm(latent)[:, None], key[:, None]
        offset = cache.offset if cache is not None else 0
        turned, key = self.rope(turned, offset), self.rope(key, offset)
        if cache is not None:
            latent, key = cache.update_and_fetch(latent, key)
        attend = self._attend_latents if n == 1 else self._attend_heads
        out = attend(content, turned, latent, key, mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, n, -1))

    def _attend_latents(
        self, content: mx.array, turned: mx.array, latent: mx.array, key: mx.array, mask: Any
    ) -> mx.array:
        """One query: it goes into the latents' space, so that they are read as they are."""
        up, down = self._unpacking()
        queries = mx.concatenate([content @ up, turned], axis=-1)
        keys = mx.concatenate([latent, key], axis=-1)
        out = mx.fast.scaled_dot_product_attention(queries, keys, latent, scale=self.scale, mask=mask)
        return out @ down

    def _attend_heads(
        self, content: mx.array, turned: mx.array, latent: mx.array, key: mx.array, mask: Any
    ) -> mx.array:
        """Many queries: keys and values of every head cost less than queries as long as latents."""
        up, down = self._unpacking()
        own = latent @ up.swapaxes(-1, -2)
        keys = mx.concatenate([own, mx.broadcast_to(key, (*own.shape[:3], key.shape[-1]))], axis=-1)
        queries = mx.concatenate([content, turned], axis=-1)
        return mx.fast.scaled_dot_product_attention(queries, keys, latent @ down, scale=self.scale, mask=mask)

    def _unpacking(self) -> tuple[mx.array, mx.array]:
        """Matrices of every head: [heads, qk_nope_head_dim, kv_lora_rank] and [heads, kv_lora_rank, v_head_dim]."""
        if "_matrices" not in self.__dict__:
            layer = self.kv_b_proj
            weight = layer.weight
            if isinstance(layer, nn.QuantizedLinear):
                weight = mx.dequantize(weight, layer.scales, layer.biases, layer.group_size, layer.bits)
            whole = weight.reshape(self.num_heads, -1, self.kv_lora_rank)
            up, down = mx.split(whole, [self.qk_nope_head_dim], axis=1)
            matrices = mx.contiguous(up), mx.contiguous(down.swapaxes(-1, -2))
            mx.eval(matrices)
            object.__setattr__(self, "_matrices", matrices)
        return self.__dict__["_matrices"]


def keep_latents(model: nn.Module) -> None:
    """Make layers that unpack latents before they cache them keep the latents; idempotent."""
    for module in model.modules():
        if type(module) is DeepseekV2Attention:
            module.__class__ = LatentAttention
