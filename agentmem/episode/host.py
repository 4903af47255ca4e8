"""GELU and softmax where MLX runs on the CPU: its exp and erf take one number at a time there, NumPy's exp many.

Both are as exact as float32 lets them be, a few times 1e-7.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

# Abramowitz and Stegun, 7.1.26: erf(x) = 1 - t (a1 + t (a2 + ...)) exp(-x^2), t = 1 / (1 + p x), within 1.5e-7 for x >= 0.
_P = 0.3275911
_A = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def gelu(x: mx.array) -> mx.array:
    """x (1 + erf(x / sqrt 2)) / 2 of float32, any shape; evaluates x."""
    rows = np.array(x)
    size = np.abs(rows)
    t = size * np.float32(_P * math.sqrt(0.5))
    t += 1
    np.reciprocal(t, out=t)
    tail = np.full_like(t, _A[0])
    for a in _A[1:]:
        tail *= t
        tail += np.float32(a)
    tail *= t
    np.multiply(rows, rows, out=t)
    t *= np.float32(-0.5)
    tail *= np.exp(t, out=t)
    tail *= size  # x erf(x / sqrt 2) is |x| - |x| tail
    rows += size
    rows -= tail
    rows *= np.float32(0.5)
    return mx.array(rows)


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array
) -> mx.array:
    """Bidirectional attention, [n, heads, tokens, dim] each; mask bool [n, 1, 1, tokens]. Evaluates its arguments."""
    scores = np.array((queries * scale) @ keys.swapaxes(-1, -2))
    scores += np.where(np.array(mask), np.float32(0), np.float32(-np.inf))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return mx.array(scores) @ values
