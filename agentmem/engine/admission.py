"""Admission: what a set of requests takes of the device's memory at most, told before one of them starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.utils import tree_flatten

from agentmem.blockpool.geometry import WORD, Geometry
from agentmem.blockpool.tails import PLACES
from agentmem.engine.packing import ROW
from agentmem.errors import ContextOverflow, ModelUnavailable
from agentmem.quant.attention import SHORT_TO
from agentmem.quant.device import backend

INTERMEDIATE, HIDDEN, QUERIES, HISTORY, ROWS, LOGITS = 2.1, 6.2, 5.9, 1.45, 2.9, 1.0
"""How many arrays of each width a pass holds at its peak, while MLX runs a few operations ahead of what it has freed.

Fitted to the peaks of 28 random models (2-4 layers, hidden 256-1024, intermediate 256-3072, 4-16 heads, 1-8 KV heads, prompts
to 2048 tokens, formats of all kinds) on a CPU: within 15 % of what a pass adds.
"""
SCORES = 0.9
"""The same for scores [heads, tokens, keys], which MLX's CPU attention makes."""
SHORT = 3.0
"""The same for the float32 scores of short chunks on CUDA, see `short_attention`."""
AHEAD = 9.0
"""Layers of a pass whose arrays MLX has asked for on CUDA while it has not given back the first ones: ten graphs of operations
may be on their way. Fitted to one run: 8 streams, a prompt of 16,384 tokens, Llama-3.1-8B's shape with 4-bit weights, an H200."""
CARRIED = 6
"""States of layers that carry them along which a sequence holds: now, before, at the end of its prompt, and for checkpoints."""
AT_ONCE = 2
"""Decode steps on their way: one is built while the device is at the one before."""
COMPOSING = 8.0
"""Rows of 16 bits that a token of a prompt stands for while it is composed: its state, base and offset in float32, and the row
itself. A prompt that is read instead keeps one, for what may be learned of it."""


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
    `fused` and `splits`: see `Runner` and `Network`.

    Peak = weights + key maps + arena + tails + a prefill chunk and the decode steps that are on their way, of one layer each.
    One request alone never does both.
    """

    def __init__(
        self, size: ModelSize, geometry: Geometry, arena_bytes: int, limit: int, *, chunk_tokens: int, fused: bool,
        splits: bool,
    ) -> None:  # fmt: skip
        self.limit = limit
        self.standing = size.weights + arena_bytes + sum(m.nbytes for m in geometry.key_maps)
        self._size, self._geometry = size, geometry
        self._chunk, self._fused, self._splits = chunk_tokens, fused, splits
        self._backend = backend()

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

    def set_aside(self, size: int) -> bool:
        """Count `size` more bytes as standing, if a short prompt fits beside them."""
        if self.peak([self._chunk]) + size > self.limit:
            return False
        self.standing += size
        return True

    def figures(self) -> dict[str, int]:
        """For `/health`. Any thread."""
        return {
            "limit_bytes": self.limit,
            "standing_bytes": self.standing,
            "active_bytes": mx.get_active_memory(),
            "peak_bytes": mx.get_peak_memory(),
        }

    def peak(self, requests: Sequence[int], composing: int = 0) -> int:
        """Bytes at the peak of requests that run together, with `composing` tokens in those of them that may be composed."""
        if not requests:
            return self.standing
        prefill, decode = self._prefill(requests), AT_ONCE * self._decode(requests)
        step = max(prefill, decode) if len(requests) == 1 else prefill + decode
        states = COMPOSING * composing * self._geometry.raw_row_bytes
        carried = len(requests) * self._geometry.carried_words * WORD * CARRIED
        return round(self.standing + self._tails(len(requests)) + carried + step + states)

    def check(self, request: Sequence[int]) -> None:
        """Raises ContextOverflow when a request, with the tokens of each of its replies, would not fit even if it were alone."""
        need = self.peak(request)
        if need > self.limit:
            raise ContextOverflow(
                f"{max(request)} tokens of prompt and reply need {need} bytes at their peak; memory_limit allows {self.limit}. "
                "Shorten the conversation, lower max_tokens, chunk_tokens or ram_budget, or raise memory_limit.",
                param="messages",
            )

    def fits(self, requests: Sequence[int], composing: int = 0) -> bool:
        """Whether these may run together; see `peak`."""
        return self.peak(requests, composing) <= self.limit

    def _tails(self, sequences: int) -> int:
        """A step writes them anew while the one before it still reads them."""
        places = PLACES
        while places < sequences:
            places *= 2
        return AT_ONCE * places * self._geometry.page_tokens * self._geometry.raw_row_bytes

    def _row(self, tokens: int) -> float:
        """What one layer's `tokens` keys and values take in model precision."""
        widest = max(c.shape.heads * (c.shape.key_dim + c.shape.value_dim) for c in self._geometry.codecs)
        return HISTORY * widest * tokens * self._size.itemsize

    def _layer(self, tokens: int) -> float:
        """What one layer makes of `tokens`, but for attention."""
        s = self._size
        return s.itemsize * tokens * (INTERMEDIATE * s.intermediate + HIDDEN * s.hidden + QUERIES * s.queries)

    def _results(self, tokens: int, logits: int) -> float:
        """What a pass has made at its end: the rows of `tokens` in all layers, and logits."""
        return (
            ROWS * tokens * self._geometry.raw_row_bytes
            + LOGITS * logits * self._size.vocab * self._size.itemsize
        )

    def _prefill(self, requests: Sequence[int]) -> float:
        """A pass at the end of the prompts, whose last tokens get logits; all of them where the model's head is not its own."""
        pieces = len(requests)
        tokens = min(self._chunk, sum(requests)) + (pieces - 1) * ROW
        logits = pieces if self._splits else tokens
        layer = self._layer(tokens) + self._scores(tokens, max(requests)) + self._row(sum(requests))
        ahead = min(AHEAD, self._geometry.layers) if self._backend == "cuda" else 1.0
        return ahead * layer + self._results(tokens, logits)

    def _scores(self, tokens: int, keys: int) -> float:
        """What attention makes of `tokens` queries beside its output; Metal's keeps nothing."""
        s = self._size
        if self._backend == "cpu":
            return SCORES * s.query_heads * s.itemsize * tokens * keys
        if self._backend == "cuda":
            return SHORT * s.query_heads * WORD * min(tokens, SHORT_TO) * keys
        return 0.0

    def _decode(self, requests: Sequence[int]) -> float:
        """A token each. The fused path reads packed rows; without it, each sequence's rows of one layer are unpacked."""
        unpacked = 0.0 if self._fused else self._row(sum(requests))
        return self._layer(len(requests)) + self._results(len(requests), len(requests)) + unpacked
