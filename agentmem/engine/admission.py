"""Admission: what a set of requests takes of the device's memory at most, told before one of them starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.utils import tree_flatten

from agentmem.blockpool.geometry import Geometry
from agentmem.engine.sequence import LAST_CHUNK
from agentmem.errors import ContextOverflow, ModelUnavailable
from agentmem.quant.device import backend

INTERMEDIATE, HIDDEN, QUERIES, HISTORY, ROWS, LOGITS = 2.2, 6.5, 6.0, 1.6, 3.0, 1.0
"""How many arrays of each width a pass holds at its peak, while MLX runs a few operations ahead of what it has freed.

Fitted to the peaks of 28 random models (2-4 layers; hidden 256-1024, intermediate 256-3072, 4-16 heads, 1-8 KV heads, prompts
to 2048 tokens, all kinds of formats) on a CPU, and rounded up: within 15 % of the part that a pass adds.
"""
SCORES = 0.95
"""The same for scores [heads, tokens, keys], which only MLX's CPU attention makes."""
GROWTH = 1.5
"""Tails move to twice the memory when they grow; a third of what they then have is the old one's."""
SLACK = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Widths of a model's arrays, in elements, with `itemsize` bytes each; `weights` in bytes."""

    weights: int
    hidden: int
    intermediate: int
    vocab: int
    queries: int
    query_heads: int
    itemsize: int


def model_size(model: nn.Module, geometry: Geometry, query_heads: int, dtype: mx.Dtype) -> ModelSize:
    """Sizes as the model's configuration has them; what that does not say is taken for larger than it is."""
    args = _arguments(model)
    queries = query_heads * geometry.codecs[0].shape.key_dim
    hidden = getattr(args, "hidden_size", queries)
    dense = getattr(args, "intermediate_size", 4 * hidden)
    experts = getattr(args, "moe_intermediate_size", 0) * (getattr(args, "num_experts_per_tok", 0) or 0)
    named: list[Any] = list(tree_flatten(model.parameters()))
    return ModelSize(
        weights=sum(value.nbytes for _, value in named),
        hidden=hidden,
        intermediate=max(dense, experts),
        vocab=getattr(args, "vocab_size", 1 << 18),
        queries=queries,
        query_heads=query_heads,
        itemsize=dtype.size,
    )


def _arguments(model: nn.Module) -> Any:
    """The configuration of the model, or of the first module in it that has one."""
    return next((m.args for _, m in model.named_modules() if hasattr(m, "args")), None)


def device_bytes() -> int:
    """Memory of MLX's device; of the machine, where the device does not say."""
    info = mx.device_info()
    sizes = [info[name] for name in ("memory_size", "total_memory") if name in info]
    return min([int(size) for size in sizes], default=psutil.virtual_memory().total)


class Admission:
    """Predicts peaks and holds them against `limit`, all in bytes. A request counts by its tokens at its end, prompt and reply.

    Peak = weights + arena + tails + the larger of a prefill chunk and a decode step, of one layer each.
    """

    def __init__(
        self, size: ModelSize, geometry: Geometry, arena_bytes: int, limit: int, *, chunk_tokens: int, fused: bool
    ) -> None:  # fmt: skip
        self.limit = limit
        self.standing = size.weights + arena_bytes
        self._size, self._geometry = size, geometry
        self._chunk, self._fused = chunk_tokens, fused
        self._scores = SCORES if backend() == "cpu" else 0.0

    def start(self) -> None:
        """Hold MLX to the limit too. Raises ModelUnavailable when not even a short prompt fits."""
        need = self.peak([self._chunk])
        if need > self.limit:
            raise ModelUnavailable(
                f"the model, the RAM budget and one chunk of a prompt need {need} bytes; memory_limit allows {self.limit}. "
                "Lower ram_budget or chunk_tokens, or raise memory_limit."
            )
        mx.set_memory_limit(self.limit)
        cache = self.limit - self.standing
        before = mx.set_cache_limit(cache)
        if before < cache:
            mx.set_cache_limit(before)

    def peak(self, requests: Sequence[int]) -> int:
        """Bytes at the peak of requests that run together."""
        if not requests:
            return self.standing
        step = max(self._prefill(max(requests)), self._decode(requests))
        return round(self.standing + GROWTH * self._tails(len(requests)) + step) + SLACK

    def check(self, request: Sequence[int]) -> None:
        """Raises ContextOverflow when a request, with the tokens of each of its replies, would not fit even if it were alone."""
        need = self.peak(request)
        if need > self.limit:
            raise ContextOverflow(
                f"{max(request)} tokens of prompt and reply need {need} bytes at their peak; memory_limit allows {self.limit}. "
                "Shorten the conversation, lower max_tokens, chunk_tokens or ram_budget, or raise memory_limit.",
                param="messages",
            )

    def fits(self, requests: Sequence[int]) -> bool:
        """Whether these may run together."""
        return self.peak(requests) <= self.limit

    def _tails(self, sequences: int) -> int:
        places = 4
        while places < sequences:
            places *= 2
        return places * self._geometry.page_tokens * self._geometry.raw_row_bytes

    def _row(self, tokens: int) -> float:
        """What one layer's `tokens` keys and values take in model precision."""
        widest = max(c.shape.heads * (c.shape.key_dim + c.shape.value_dim) for c in self._geometry.codecs)
        return HISTORY * widest * tokens * self._size.itemsize

    def _activations(self, tokens: int, logits: int) -> float:
        s = self._size
        widths = INTERMEDIATE * s.intermediate + HIDDEN * s.hidden + QUERIES * s.queries
        return (
            s.itemsize * (tokens * widths + LOGITS * logits * s.vocab) + ROWS * tokens * self._geometry.raw_row_bytes
        )  # fmt: skip

    def _prefill(self, tokens: int) -> float:
        """A chunk at the end of `tokens` tokens. Logits are made for the short chunk at the end of a prompt only."""
        s, chunk = self._size, min(self._chunk, tokens)
        scores = self._scores * s.query_heads * s.itemsize * chunk * tokens
        return (
            max(self._activations(chunk, 0), self._activations(2 * LAST_CHUNK, 2 * LAST_CHUNK))
            + scores
            + self._row(tokens)
        )

    def _decode(self, requests: Sequence[int]) -> float:
        """A token each. The fused path reads packed rows; without it, each sequence's rows of one layer are unpacked."""
        unpacked = 0.0 if self._fused else self._row(sum(requests))
        return self._activations(len(requests), len(requests)) + unpacked
