"""Attention state in the canonical frame: what a segment is, wherever it will stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.quant.device import backend
from agentmem.quant.format import LayerShape


@dataclass(frozen=True, slots=True)
class State:
    """Keys, not rotated, and values of consecutive tokens: `rows` float32 [n, width], a row of all layers for each token.

    A row has the keys of all layers, heads side by side, and then the values of all layers.
    """

    rows: mx.array
    shapes: tuple[LayerShape, ...]

    @classmethod
    def of(cls, keys: Sequence[mx.array], values: Sequence[mx.array]) -> State:
        """From keys [heads, n, key_dim] and values [heads, n, value_dim] of each layer."""
        shapes = [LayerShape(k.shape[0], k.shape[2], v.shape[2]) for k, v in zip(keys, values, strict=True)]
        flat = [
            x.astype(mx.float32).transpose(1, 0, 2).reshape(x.shape[1], x.shape[0] * x.shape[2])
            for x in (*keys, *values)
        ]
        return cls(mx.concatenate(flat, axis=1), tuple(shapes))

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def __getitem__(self, span: slice) -> State:
        """The same of some of the tokens."""
        return State(self.rows[span], self.shapes)

    def __add__(self, other: State) -> State:
        return State(self.rows + other.rows, self.shapes)

    def __sub__(self, other: State) -> State:
        return State(self.rows - other.rows, self.shapes)

    @property
    def nbytes(self) -> int:
        return int(self.rows.nbytes)

    @property
    def keys(self) -> list[mx.array]:
        """[heads, n, key_dim] of each layer."""
        return self._layers(0, [s.key_dim for s in self.shapes])

    @property
    def values(self) -> list[mx.array]:
        """[heads, n, value_dim] of each layer."""
        return self._layers(key_width(self.shapes), [s.value_dim for s in self.shapes])

    def _layers(self, at: int, dims: Sequence[int]) -> list[mx.array]:
        out = []
        for shape, dim in zip(self.shapes, dims, strict=True):
            width = shape.heads * dim
            part = self.rows[:, at : at + width].reshape(len(self), shape.heads, dim)
            out.append(part.transpose(1, 0, 2))
            at += width
        return out


def key_width(shapes: Sequence[LayerShape]) -> int:
    """Elements of a row that are keys."""
    return sum(s.heads * s.key_dim for s in shapes)


def above_first(shapes: Sequence[LayerShape]) -> mx.array:
    """bool [width]: which elements of a row belong to layers that know their context, all but layer 0."""
    first, keys = shapes[0], key_width(shapes)
    width = keys + sum(s.heads * s.value_dim for s in shapes)
    at = mx.arange(width)
    return ~(
        (at < first.heads * first.key_dim) | ((at >= keys) & (at < keys + first.heads * first.value_dim))
    )


def joined(states: Sequence[State]) -> State:
    """States one behind the other."""
    return State(mx.concatenate([s.rows for s in states]), states[0].shapes)


LEVELS = np.array([-1.5, -0.5, 0.5, 1.5], np.float32)
"""What the four codes of 2 bits stand for, in steps."""
STEP = 0.9957
"""Of 2 bits, in standard deviations of a group: so four even levels lose least of a normal distribution, 12 % of its squares."""


@dataclass(frozen=True, slots=True)
class PackedState:
    """A state in 2, 4 or 8 bits: codes uint32, scales and biases float16 [n, groups], in the layout of `mx.quantize`."""

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    shapes: tuple[LayerShape, ...]

    @classmethod
    def of(cls, state: State, bits: int) -> PackedState:
        """Quantised once, from float32: 4 and 8 bits in groups within a head, 2 bits in groups of 128. What is zero stays zero.

        Raises ValueError for heads whose dims are no multiple of 32.
        """
        dims = {d for s in state.shapes for d in (s.key_dim, s.value_dim)}
        if any(d % 32 for d in dims):
            raise ValueError(f"heads of {sorted(dims)} dims cannot be packed; multiples of 32 can")
        group = 32 if any(d % 64 for d in dims) else 64
        if bits == 2:
            codes, scales, biases = _in_four_levels(
                state.rows, next(g for g in (128, 64, 32) if not state.rows.shape[1] % g)
            )
        else:
            codes, scales, biases = mx.quantize(state.rows, group_size=group, bits=bits)
        packed = cls(codes, scales.astype(mx.float16), biases.astype(mx.float16), bits, state.shapes)
        mx.eval(packed.codes, packed.scales, packed.biases)
        return packed

    def __getitem__(self, span: slice | np.ndarray) -> PackedState:
        """The same of some of the tokens, packed."""
        at: Any = span if isinstance(span, slice) else mx.array(span)
        return PackedState(self.codes[at], self.scales[at], self.biases[at], self.bits, self.shapes)

    def unpacked(self) -> State:
        if backend() == "cpu":
            return State(mx.array(self._on_host()), self.shapes)
        rows = mx.dequantize(
            self.codes, self.scales.astype(mx.float32), self.biases.astype(mx.float32),
            group_size=32 * self.codes.shape[1] // (self.bits * self.scales.shape[1]), bits=self.bits,
        )  # fmt: skip
        return State(rows, self.shapes)

    def _on_host(self) -> np.ndarray:
        """The rows, float32. MLX unpacks on a CPU one element after the other, in several times the time."""
        codes = np.asarray(self.codes).view(np.uint8)
        n, groups = self.scales.shape
        whole = self.bits == 8
        elements = codes.astype(np.float32) if whole else np.take(_of_byte(self.bits), codes).view(np.float32)
        grouped = elements.reshape(n, groups, -1)
        grouped *= np.asarray(self.scales.astype(mx.float32))[:, :, None]
        grouped += np.asarray(self.biases.astype(mx.float32))[:, :, None]
        return grouped.reshape(n, -1)

    def __len__(self) -> int:
        return int(self.codes.shape[0])

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes + self.biases.nbytes)


def stacked(states: Sequence[PackedState]) -> PackedState:
    """Packed states of the same kind one behind the other."""
    codes, scales, biases = (
        mx.concatenate([getattr(s, part) for s in states]) for part in ("codes", "scales", "biases")
    )
    return PackedState(codes, scales, biases, states[0].bits, states[0].shapes)


def weighed(weights: mx.array, states: Sequence[PackedState]) -> mx.array:
    """The rows of all states, weighted: float32 [n, m], m the tokens of all states -> [n, width].

    On a CPU one state after the other, so that what is unpacked stays in the processor's cache.
    """
    if backend() != "cpu":
        return weights @ stacked(states).unpacked().rows
    out, at = mx.zeros((weights.shape[0], 1)), 0
    for state in states:
        out = out + weights[:, at : at + len(state)] @ state.unpacked().rows
        mx.eval(out)
        at += len(state)
    return out


def _in_four_levels(rows: mx.array, group: int) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of 2 bits: `mx.quantize` spreads them over the extremes, which loses twice as much."""
    grouped = rows.reshape(rows.shape[0], -1, group)
    middle = grouped.mean(axis=2, keepdims=True)
    scales = STEP * mx.sqrt(((grouped - middle) ** 2).mean(axis=2, keepdims=True))
    scales = scales.astype(mx.float16).astype(mx.float32)
    biases = (middle + float(LEVELS[0]) * scales).astype(mx.float16).astype(mx.float32)
    codes = mx.clip(mx.round((grouped - biases) / mx.maximum(scales, 1e-12)), 0, 3).astype(mx.uint32)
    codes = codes.reshape(rows.shape[0], -1, 16) << (2 * mx.arange(16, dtype=mx.uint32))
    return codes.sum(axis=2), scales[..., 0], biases[..., 0]


@cache
def _of_byte(bits: int) -> np.ndarray:
    """The codes in each possible byte as float32, those of a byte in one element of complex type."""
    bytes = np.arange(256)[:, None] >> np.arange(0, 8, bits)[None] & ((1 << bits) - 1)
    return bytes.astype(np.float32).view(np.complex64 if bits == 4 else np.complex128)[:, 0]
