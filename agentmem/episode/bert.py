"""BERT, the network of most sentence encoders, in MLX: bidirectional, learned positions, layer norm behind each part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from agentmem.episode import host
from agentmem.errors import ModelUnavailable
from agentmem.quant.device import backend

PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
NORMS = {"attended": "attention.output.LayerNorm", "finished": "output.LayerNorm"}


@dataclass(frozen=True, slots=True)
class BertConfig:
    """Sizes of the network, as config.json names them."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> BertConfig:
        """Raises ModelUnavailable for another network than the plain BERT."""
        kind = config.get("model_type")
        if kind != "bert":
            raise ModelUnavailable(
                f"Sentence encoders of type {kind!r} are not supported, only those of type 'bert'"
            )
        for key, wanted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if config.get(key, wanted) != wanted:
                raise ModelUnavailable(f"BERT with {key} {config[key]!r} is not supported, only {wanted!r}")
        return cls(
            int(config["hidden_size"]),
            int(config["num_hidden_layers"]),
            int(config["num_attention_heads"]),
            int(config["max_position_embeddings"]),
            float(config.get("layer_norm_eps", 1e-12)),
        )


class Bert:
    """The network over float32 weights under their names in the file. Engine thread only: it is made of MLX arrays."""

    def __init__(self, config: BertConfig, weights: Mapping[str, mx.array]) -> None:
        """Raises ModelUnavailable where a weight is missing. Names may begin with "bert."."""
        self.config = config
        self._weights = {
            name.removeprefix("bert."): weight.astype(mx.float32)
            for name, weight in weights.items()
            if mx.issubdtype(weight.dtype, mx.floating)
        }
        if missing := [name for name in self._needed() if name not in self._weights]:
            raise ModelUnavailable(f"The sentence encoder's weights lack {missing[0]}")
        on_host = backend() == "cpu"
        self._gelu = host.gelu if on_host else nn.gelu
        self._attention = host.attention if on_host else mx.fast.scaled_dot_product_attention

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        """ids int32 [n, tokens] and mask bool [n, tokens], true where there is a token -> hidden [n, tokens, dims], lazily."""
        hidden = self._embedded(ids)
        visible = mask[:, None, None, :]
        for number in range(self.config.num_hidden_layers):
            hidden = self._layer(f"encoder.layer.{number}.", hidden, visible)
        return hidden

    def _embedded(self, ids: mx.array) -> mx.array:
        w = self._weights
        hidden = (
            w["embeddings.word_embeddings.weight"][ids]
            + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
            + w["embeddings.token_type_embeddings.weight"][0]
        )
        return self._norm("embeddings.LayerNorm", hidden)

    def _layer(self, at: str, hidden: mx.array, visible: mx.array) -> mx.array:
        n, tokens, dims = hidden.shape
        heads = self.config.num_attention_heads

        def split(part: str) -> mx.array:
            return self._linear(at + PARTS[part], hidden).reshape(n, tokens, heads, -1).swapaxes(1, 2)

        mixed = self._attention(
            split("query"), split("key"), split("value"), scale=(dims // heads) ** -0.5, mask=visible
        )
        mixed = self._linear(at + PARTS["out"], mixed.swapaxes(1, 2).reshape(n, tokens, dims))
        hidden = self._norm(at + NORMS["attended"], hidden + mixed)
        wide = self._gelu(self._linear(at + PARTS["up"], hidden))
        return self._norm(at + NORMS["finished"], hidden + self._linear(at + PARTS["down"], wide))

    def _linear(self, name: str, x: mx.array) -> mx.array:
        return mx.addmm(self._weights[f"{name}.bias"], x, self._weights[f"{name}.weight"].T)

    def _norm(self, name: str, x: mx.array) -> mx.array:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return mx.fast.layer_norm(x, weight, bias, self.config.layer_norm_eps)

    def _needed(self) -> list[str]:
        embeddings = [f"embeddings.{part}_embeddings.weight" for part in ("word", "position", "token_type")]
        both = ["embeddings.LayerNorm"]
        for number in range(self.config.num_hidden_layers):
            both += [f"encoder.layer.{number}.{part}" for part in (*PARTS.values(), *NORMS.values())]
        return embeddings + [f"{name}.{kind}" for name in both for kind in ("weight", "bias")]
