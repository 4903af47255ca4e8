"""From logits to the next token, for one sequence."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from agentmem.engine.request import Sampling


class Sampler:
    """Chooses tokens for one reply. With a seed, the choice depends on the seed and the position only."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._s = sampling
        self._seed = sampling.seed if sampling.seed is not None else seed
        self._counts: Counter[int] = Counter()

    def choose(self, logits: mx.array, position: int) -> mx.array:
        """logits [vocab] -> token id, lazily, as a scalar array. `position`: index of the token in the reply."""
        s = self._s
        logits = self._penalised(logits.astype(mx.float32))
        if s.temperature == 0 or s.top_p == 0:
            return mx.argmax(logits)
        logprobs = (logits - mx.logsumexp(logits))[None]
        if 0 < s.top_p < 1:
            logprobs = apply_top_p(logprobs, s.top_p)
        if s.min_p > 0:
            logprobs = apply_min_p(logprobs, s.min_p)
        if 0 < s.top_k < logits.shape[0]:
            logprobs = apply_top_k(logprobs, s.top_k)
        key = mx.random.key((self._seed * 1_000_003 + position) % (1 << 63))
        return mx.random.categorical(logprobs / s.temperature, key=key)[0]

    def saw(self, token: int) -> None:
        """Count a token of the reply, for the penalties."""
        self._counts[token] += 1

    def _penalised(self, logits: mx.array) -> mx.array:
        s = self._s
        change = {
            t: bias for t, bias in s.logit_bias.items() if 0 <= t < logits.shape[0]
        }  # MLX checks no bounds
        if s.frequency_penalty or s.presence_penalty:
            for token, n in self._counts.items():
                change[token] = change.get(token, 0.0) - s.frequency_penalty * n - s.presence_penalty
        if not change:
            return logits
        return logits.at[mx.array(list(change))].add(mx.array(list(change.values()), dtype=mx.float32))
