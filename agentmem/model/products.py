"""Products with packed weights where all sequences of a batch are rows of one matrix.

MLX's CUDA kernels take the sequences of a batch one by one, and read the weights once for each; rows of one matrix share
what is read. From two to seven rows they have no kernel that does: some rows of nothing make eight of four.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from agentmem.quant.device import backend

TILE = 8
FEWEST = 4
"""Rows from which the kernel for eight is faster than that for single ones."""


class JoinedLinear(nn.QuantizedLinear):
    """The layer that it was, for one token of each of several sequences as well."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [batch, n, in] -> [batch, n, out]"""
        rows = x.shape[0]
        if x.ndim != 3 or x.shape[1] != 1 or rows == 1:
            return super().__call__(x)
        joined = x.swapaxes(0, 1)
        if FEWEST <= rows < TILE:
            joined = mx.pad(joined, [(0, 0), (0, TILE - rows), (0, 0)])
        out = super().__call__(joined)
        return (out if out.shape[1] == rows else out[:, :rows]).swapaxes(0, 1)


def join_rows(model: nn.Module) -> None:
    """Make the packed layers of `model` take the sequences of a batch together, where that is not MLX's way; idempotent."""
    if backend() != "cuda":
        return
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = JoinedLinear
