"""Key maps: what keys go through as they enter the cache, and queries at attention, so that keys pack well and scores stay.

Scores are products of mapped queries and mapped keys, of which all keys of one softmax go through the same map: any
invertible linear map that queries undo, and one vector taken off every key, leave attention as it was.
"""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx
import numpy as np

from agentmem.quant.attention import rotate

LANES = 32
"""Of a warp, which maps a key by itself."""


class KeyMap:
    """The map of one layer: `rotation` as the format names it ("none": nothing, "hadamard": the same for all heads)."""

    def __init__(self, rotation: str = "none") -> None:
        self._rotation = rotation
        self.nbytes = 0
        self.vectors: mx.array | None = None
        """What the decode kernel needs to do the same, float32 [heads, 3, key_dim]: what queries are multiplied with before a
        Hadamard matrix, what keys are, and what is added to keys behind it. None: it cannot."""

    def keys(self, keys: mx.array) -> mx.array:
        """keys [batch, heads, n, key_dim] of the model -> the same shape and dtype, as they are stored."""
        return rotate(keys, self._rotation)

    def restored(self, keys: mx.array) -> mx.array:
        """Keys [batch, heads, n, key_dim] as they are stored -> the model's, float32: the inverse of `keys`."""
        return rotate(
            keys.astype(mx.float32), self._rotation
        )  # a normalised Hadamard matrix is its own inverse

    def queries(self, queries: mx.array) -> mx.array:
        """queries [batch, query heads, n, key_dim] of the model -> the same shape and dtype, for stored keys."""
        return rotate(queries, self._rotation)


class CalibratedMap(KeyMap):
    """Keys k become ((k - mean) / scale) H and queries q become (q scale) H, each head with values of its own.

    mean, scale float32 [heads, key_dim], scales powers of two; `dtype` is that of the model. Both maps are one product
    with a matrix whose elements a half-precision type holds exactly, so that each result is rounded once.
    """

    def __init__(self, mean: np.ndarray, scale: np.ndarray, dtype: mx.Dtype) -> None:
        super().__init__("hadamard")
        self._heads, dim = mean.shape
        signs, block = hadamard(dim)
        norm = 2.0 ** -round(math.log2(block) / 2)
        forward = signs * (norm / scale)[:, :, None]
        back = signs * (scale / (block * norm))[:, :, None]
        # Queries of other dims than powers of two would be scaled by a rounded factor in half precision.
        exact = math.log2(block).is_integer()
        self._forward = mx.array(forward).astype(dtype)
        self._shift = mx.array(-mean[:, None, :] @ forward).astype(dtype)
        self._back = mx.array(back).astype(dtype if exact else mx.float32)
        self.nbytes = self._forward.nbytes + self._shift.nbytes + self._back.nbytes
        if block == dim and exact and dim % (2 * LANES) == 0:
            shift = np.array(self._shift.astype(mx.float32))[:, 0]
            self.vectors = mx.array(
                np.stack([scale / (block * norm), norm / scale, shift], 1).astype(np.float32)
            )
            self.nbytes += self.vectors.nbytes

    def keys(self, keys: mx.array) -> mx.array:
        return mx.addmm(self._shift, keys, self._forward)

    def restored(self, keys: mx.array) -> mx.array:
        shift, back = (x.astype(mx.float32) for x in (self._shift, self._back))
        return (keys.astype(mx.float32) - shift) @ back.swapaxes(-1, -2)

    def queries(self, queries: mx.array) -> mx.array:
        grouped = queries.reshape(queries.shape[0], self._heads, -1, queries.shape[-1])
        out = (grouped @ self._back).reshape(queries.shape)
        return out if out.dtype == queries.dtype else out.astype(queries.dtype)


@cache
def hadamard(dim: int) -> tuple[np.ndarray, int]:
    """A matrix of orthogonal rows along `dim`, float32 [dim, dim], and b, the length of its blocks: H H^T = b I.

    Elements are 1 and -1 within the blocks and 0 outside. One block where a Hadamard matrix of that order is known to MLX
    (m 2^k with m of 1, 12, 20, 28), else as many of the largest power of two that divides `dim`.
    """
    power = dim & -dim
    whole = any(dim % m == 0 and (dim // m).bit_count() == 1 for m in (1, 12, 20, 28))
    block = dim if whole else power
    signs = np.sign(np.array(mx.hadamard_transform(mx.eye(block, stream=mx.cpu), stream=mx.cpu)))
    return np.kron(np.eye(dim // block, dtype=np.float32), signs).astype(np.float32), block
