"""Key maps: what keys go through as they enter the cache, and queries at attention, so that keys pack well and scores stay.

Scores are products of mapped queries and mapped keys, of which all keys of one softmax go through the same map: any
invertible linear map that queries undo, and one vector taken off every key, leave attention as it was.
"""

from __future__ import annotations

import mlx.core as mx

from agentmem.quant.attention import rotate


class KeyMap:
    """The map of one layer: `rotation` as the format names it ("none": nothing, "hadamard": the same for all heads)."""

    def __init__(self, rotation: str = "none") -> None:
        self._rotation = rotation

    def keys(self, keys: mx.array) -> mx.array:
        """keys [batch, heads, n, key_dim] of the model -> the same shape and dtype, as they are stored."""
        return rotate(keys, self._rotation)

    def queries(self, queries: mx.array) -> mx.array:
        """queries [batch, query heads, n, key_dim] of the model -> the same shape and dtype, for stored keys."""
        return rotate(queries, self._rotation)
