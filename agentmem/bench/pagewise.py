"""Schemes that look across a page, beside which row-wise formats are measured: simulated, and not to be chosen.

They quantise a page at once. Rows of such a page can be neither written turn by turn, nor picked by a view, nor shared with a
chat that goes on from its middle, unless they were quantised twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from agentmem.compose.prompt import Line

PAGE, GROUP = 64, 64

Scheme = Callable[[mx.array, int], mx.array]


def _through(x: mx.array, bits: int) -> mx.array:
    """x [..., multiple of GROUP] through MLX's affine code, with scales of 16 bits."""
    codes = mx.quantize(x.astype(mx.float16), group_size=GROUP, bits=bits)
    return mx.dequantize(*codes, group_size=GROUP, bits=bits).astype(mx.float32)


def rows(x: mx.array, bits: int) -> mx.array:
    """x [pages, heads, PAGE, dim]: every row by itself."""
    return _through(x, bits)


def mean_and_rotation(x: mx.array, bits: int) -> mx.array:
    """The page's mean taken off, then a Hadamard rotation along the dims."""
    mean = x.mean(2, keepdims=True).astype(mx.float16).astype(mx.float32)
    return mx.hadamard_transform(_through(mx.hadamard_transform(x - mean), bits)) + mean


def channels(x: mx.array, bits: int) -> mx.array:
    """A scale for each channel of a page."""
    return _through(x.swapaxes(2, 3), bits).swapaxes(2, 3)


@dataclass(frozen=True, slots=True)
class Paged:
    """`bits` an element, scales and means counted, without the first page, which stays in 16 bits."""

    name: str
    bits: float
    key_bits: int
    value_bits: int
    scheme: Scheme

    def behind(self, keys: mx.array, values: mx.array) -> Line:
        """A cache over keys and values [1, heads, n, dim]; the first page, and what fills none, stay as they are."""
        line = Line()
        line.append(
            self._packed(keys[0], self.key_bits, self.scheme), self._packed(values[0], self.value_bits, rows)
        )
        return line

    @staticmethod
    def _packed(x: mx.array, bits: int, scheme: Scheme) -> mx.array:
        heads, n, dim = x.shape
        end = n // PAGE * PAGE
        if end <= PAGE:
            return x
        pages = x[:, PAGE:end].astype(mx.float32).reshape(heads, -1, PAGE, dim).swapaxes(0, 1)
        packed: Any = scheme(pages, bits).swapaxes(0, 1).reshape(heads, -1, dim).astype(x.dtype)
        return mx.concatenate([x[:, :PAGE], packed, x[:, end:]], axis=1)


SCHEMES = (
    Paged("page means, rotated, 4 bits", 4.625, 4, 4, mean_and_rotation),
    Paged("channels of a page, 4 bits", 4.5, 4, 4, channels),
    Paged("page means, rotated, 3 bits", 3.625, 3, 3, mean_and_rotation),
    Paged("channels of a page, 3 bits", 3.5, 3, 3, channels),
)
