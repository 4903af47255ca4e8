"""What the model itself thought of a token: log probabilities before penalties, bias, temperature and filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.engine.request import TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class Ranking:
    """The log probability of one token and the `top` likeliest tokens at its place, computed lazily in float32."""

    def __init__(self, logits: mx.array, token: mx.array, top: int) -> None:
        """logits [vocab], token a scalar; `top` may be 0."""
        logits = logits.astype(mx.float32)
        total, vocab = mx.logsumexp(logits), logits.shape[0]
        top = min(top, vocab)
        self._token, self._logprob = token, logits[token] - total
        self._ids = mx.argpartition(logits, kth=vocab - top)[vocab - top :] if top else mx.zeros(0, mx.uint32)
        self._logprobs = logits[self._ids] - total

    @property
    def arrays(self) -> list[mx.array]:
        """To be evaluated with the step."""
        return [self._token, self._logprob, self._ids, self._logprobs]

    def read(self, piece: Callable[[int], bytes]) -> TokenLogprob:
        """The figures, best first; `piece` gives the bytes of a token. Among equals the chosen token is first."""
        token, logprob = int(self._token.item()), _finite(self._logprob.item())  # type: ignore[arg-type]
        ids, values = np.array(self._ids).tolist(), [_finite(x) for x in np.array(self._logprobs)]
        ranked = sorted(zip(values, ids, strict=True), key=lambda one: (-one[0], one[1] != token, one[1]))
        if ranked and ranked[-1][0] == logprob and all(i != token for _, i in ranked):
            ranked = sorted(
                [*ranked[:-1], (logprob, token)], key=lambda one: (-one[0], one[1] != token, one[1])
            )
        top = tuple(TokenLogprob(i, piece(i), value) for value, i in ranked)
        return TokenLogprob(token, piece(token), logprob, top)


def _finite(value: Any) -> float:
    return float(np.nan_to_num(np.float32(value), nan=LOWEST, neginf=LOWEST, posinf=0.0))
