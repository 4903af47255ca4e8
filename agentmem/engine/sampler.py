"""From logits to the next tokens: a row of logits for every sequence, chosen as its request says."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import apply_top_k, make_repetition_penalty

from agentmem.engine.request import Sampling
from agentmem.model.grammar import Constraint

COLDEST = 1e-5
"""Below this temperature float32 cannot hold the quotients; the choice is the likeliest token anyway."""


class Sampler:
    """Chooses tokens for one reply. With a seed, the choice depends on the seed and the position only.

    `prompt`: the tokens before the reply, which the repetition penalty takes for said. `constraint`: what it may say.
    """

    def __init__(
        self, sampling: Sampling, seed: int, prompt: Iterable[int] = (), constraint: Constraint | None = None
    ) -> None:
        self._s = sampling
        self._constraint = constraint
        self._seed = sampling.seed if sampling.seed is not None else seed
        self._counts: Counter[int] = Counter()
        self._repeats = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._greedy = sampling.temperature < COLDEST or sampling.top_p == 0

    @property
    def plain(self) -> bool:
        """Whether every choice is the likeliest token of the model, whatever was said."""
        return self._greedy and self.forgetful and not self._s.logit_bias

    @property
    def forgetful(self) -> bool:
        """Whether choices do not depend on what was said, but for what the model makes of it."""
        s = self._s
        penalised = s.frequency_penalty or s.presence_penalty or s.repetition_penalty != 1
        return not penalised and self._constraint is None

    def sibling(self, number: int) -> Sampler:
        """For another reply to the same prompt, before its first token: the same settings, a seed of its own."""
        digest = hashlib.blake2b(f"{self._seed} {number}".encode(), digest_size=8).digest()
        constraint = self._constraint.fork() if self._constraint is not None else None
        return Sampler(replace(self._s, seed=int.from_bytes(digest, "little")), 0, self._repeats, constraint)

    def choose(self, logits: mx.array, position: int) -> mx.array:
        """logits [vocab] -> token id, lazily, as a scalar array. `position`: index of the token in the reply."""
        s = self._s
        logits = self._possible(self._penalised(logits.astype(mx.float32)))
        if self._greedy:
            return mx.argmax(logits)
        logits = logits - mx.max(logits)
        if 0 < s.top_p < 1:
            logits = _nucleus(logits, s.top_p)
        if s.min_p > 0:
            logits = mx.where(logits < math.log(s.min_p), -mx.inf, logits)
        if 0 < s.top_k < logits.shape[0]:
            logits = apply_top_k(logits, s.top_k)
        key = mx.random.key((self._seed * 1_000_003 + position) % (1 << 63))
        return mx.random.categorical(logits / s.temperature, key=key)

    def saw(self, token: int) -> None:
        """Count a token of the reply, for the penalties."""
        if self._constraint is not None:
            self._constraint.saw(token)
        self._counts[token] += 1
        if self._s.repetition_penalty != 1:
            self._repeats.add(token)

    def _possible(self, logits: mx.array) -> mx.array:
        """Minus infinity for what the constraint excludes. Raises AgentMemError where it cannot tell any more."""
        if self._constraint is None:
            return logits
        possible = np.zeros(logits.shape[0], bool)
        allowed = self._constraint.allowed()[: logits.shape[0]]
        possible[: len(allowed)] = allowed
        return mx.where(mx.array(possible), logits, -mx.inf)

    def _penalised(self, logits: mx.array) -> mx.array:
        s = self._s
        if self._repeats:
            repeats = mx.array([t for t in self._repeats if t < logits.shape[0]])
            logits = make_repetition_penalty(s.repetition_penalty, repeats.size)(repeats, logits[None])[0]
        change = {
            t: bias for t, bias in s.logit_bias.items() if 0 <= t < logits.shape[0]
        }  # MLX checks no bounds
        if s.frequency_penalty or s.presence_penalty:
            for token, n in self._counts.items():
                change[token] = change.get(token, 0.0) - s.frequency_penalty * n - s.presence_penalty
        if not change:
            return logits
        return logits.at[mx.array(list(change))].add(mx.array(list(change.values()), dtype=mx.float32))


# mlx-lm's top-p and min-p are compiled with the value as a constant: a request with a value that no other had before it
# would keep every running sequence waiting for a compiler.
def _nucleus(logits: mx.array, top_p: float) -> mx.array:
    """The likeliest tokens, as few as hold the share `top_p` of the probability; the others become -inf. The largest is 0."""
    ascending = mx.sort(logits)
    weights = mx.exp(ascending)
    above = mx.cumsum(weights, reverse=True, inclusive=False)
    dropped = mx.minimum(mx.sum(above >= top_p * mx.sum(weights)), logits.shape[0] - 1)
    return mx.where(logits < ascending[dropped], -mx.inf, logits)


def choose_batch(samplers: Sequence[Sampler], logits: mx.array, positions: Sequence[int]) -> mx.array:
    """logits [B, vocab] -> token ids [B], lazily: for each sequence what its `choose` gives, at its own position.

    Plain sequences share one pass over the logits.
    """
    plain = [i for i, sampler in enumerate(samplers) if sampler.plain]
    if len(plain) == len(samplers):
        return mx.argmax(logits, axis=-1)
    others = [i for i in range(len(samplers)) if not samplers[i].plain]
    tokens = mx.stack([samplers[i].choose(logits[i], positions[i]) for i in others])
    if plain:
        tokens = mx.concatenate([mx.argmax(logits[mx.array(plain)], axis=-1), tokens])
    return tokens[mx.array(np.argsort([*plain, *others]))]
