"""Attention state in the canonical frame: what a segment is, wherever it will stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

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


AT_ONCE = 128
"""Rows that are unpacked together on a CPU."""
STEP = 0.9957
"""Of 2 bits, in standard deviations of a group: so four even levels lose least of a normal distribution, 12 % of its squares."""


@dataclass(frozen=True, slots=True)
class PackedState:
    """A state in 2, 4 or 8 bits.

    codes uint32 and scales float16 [n, groups] are as `mx.quantize` lays them out, and with 4 and 8 bits biases float16, too.
    With 2 bits codes mean -1.5, -0.5, 0.5 and 1.5 steps, and biases uint8 [n, m] are spreads of elements, cut into n rows.
    """

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
            codes, scales, biases = _in_four_levels(state.rows)
        else:
            codes, scales, biases = mx.quantize(state.rows, group_size=group, bits=bits)
            biases = biases.astype(mx.float16)
        packed = cls(codes, scales.astype(mx.float16), biases, bits, state.shapes)
        mx.eval(packed.codes, packed.scales, packed.biases)
        return packed

    def unpacked(self) -> State:
        return State(unpacked_rows([self]), self.shapes)

    def some(self, at: np.ndarray) -> PackedState:
        """Only the tokens `at`."""
        if len(at) == len(self):
            return self
        chosen = mx.array(at)
        biases = self.biases if self.bits == 2 else self.biases[chosen]
        return PackedState(self.codes[chosen], self.scales[chosen], biases, self.bits, self.shapes)

    def __len__(self) -> int:
        return int(self.codes.shape[0])

    @property
    def width(self) -> int:
        """Elements of a row."""
        return int(self.codes.shape[1]) * 32 // self.bits

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes + self.biases.nbytes)


def unpacked_rows(states: Sequence[PackedState]) -> mx.array:
    """The rows of states of one kind, one behind the other, float32."""
    if backend() == "cpu":
        return mx.array(_on_host(states))
    return mx.concatenate([_on_device(s) for s in states])


def weighed(weights: mx.array, states: Sequence[PackedState], at: Sequence[np.ndarray]) -> mx.array:
    """Rows `at` of the states, weighted: float32 [n, m], m the rows chosen of all states -> [n, width].

    On a CPU some states after others, so that what is unpacked stays in the processor's cache.
    """
    chosen = [s.some(a) for s, a in zip(states, at, strict=True)]
    if backend() != "cpu":
        return weights @ unpacked_rows(chosen)
    out, start, first = mx.zeros((weights.shape[0], states[0].width)), 0, 0
    while first < len(chosen):
        last = first + 1
        while last < len(chosen) and sum(map(len, chosen[first : last + 1])) <= AT_ONCE:
            last += 1
        rows = unpacked_rows(chosen[first:last])
        out = mx.addmm(out, weights[:, start : start + len(rows)], rows)
        mx.eval(out)
        start, first = start + len(rows), last
    return out


def _on_device(state: PackedState) -> mx.array:
    scales = state.scales.astype(mx.float32)
    rows = mx.dequantize(
        state.codes, scales, -1.5 * scales if state.bits == 2 else state.biases.astype(mx.float32),
        group_size=32 * state.codes.shape[1] // (state.bits * state.scales.shape[1]), bits=state.bits,
    )  # fmt: skip
    if state.bits != 2:
        return rows
    halves = mx.array(_halves().view(np.float32).reshape(256, 2))
    at = state.biases.reshape(-1)[: rows.shape[1] // 2].astype(mx.int32)
    return rows * halves[at].reshape(-1)


def _on_host(states: Sequence[PackedState]) -> np.ndarray:
    """The rows, float32. MLX unpacks on a CPU one element after the other, in several times the time."""
    bits = states[0].bits
    codes = _stacked([s.codes for s in states]).view(np.uint8)
    scales = _stacked([s.scales for s in states]).astype(np.float32)
    n, width = len(codes), codes.shape[1] * 8 // bits
    elements = codes.astype(np.float32) if bits == 8 else np.take(_of_byte(bits), codes).view(np.float32)
    grouped = elements.reshape(n, scales.shape[1], width // scales.shape[1])
    grouped *= scales[:, :, None]
    if bits != 2:
        grouped += _stacked([s.biases for s in states]).astype(np.float32)[:, :, None]
    rows, start = grouped.reshape(n, width), 0
    for state in states if bits == 2 else ():
        rows[start : start + len(state)] *= _spread(state.biases, width)
        start += len(state)
    return rows


def _stacked(parts: Sequence[mx.array]) -> np.ndarray:
    return np.asarray(parts[0]) if len(parts) == 1 else np.concatenate([np.asarray(p) for p in parts])


def _in_four_levels(rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and spreads of 2 bits.

    Elements differ in size by far more than tokens do, and `mx.quantize` spreads its levels over the extremes: either would lose
    twice as much. So elements are divided by what they are in all tokens, about, and then stepped by a group's deviation.
    """
    n, width = rows.shape
    group = next(g for g in (128, 64, 32) if not width % g)
    size = mx.sqrt((rows**2).mean(axis=0)) if n else mx.zeros((width,))
    largest = mx.maximum(size.max(), 1e-30)
    halves = mx.clip(mx.round(15 + 2 * mx.log2(mx.maximum(size / largest, 1e-30))), 0, 15).astype(mx.uint8)
    spreads = halves[0::2] | (halves[1::2] << 4)
    spreads = mx.pad(spreads, (0, -len(spreads) % max(n, 1)))
    biases = spreads.reshape(n, -1) if n else mx.zeros((0, 1), dtype=mx.uint8)
    grouped = (rows / mx.array(_spread(biases, width))).reshape(n, width // group, group)
    scales = (STEP * mx.sqrt((grouped**2).mean(axis=2))).astype(mx.float16)
    steps = grouped / mx.maximum(scales.astype(mx.float32), 1e-12)[:, :, None]
    codes = mx.clip(mx.round(steps + 1.5), 0, 3).astype(mx.uint32).reshape(n, width // 16, 16)
    return (codes << (2 * mx.arange(16, dtype=mx.uint32))).sum(axis=2), scales, biases


def _spread(spreads: mx.array, width: int) -> np.ndarray:
    """What elements are multiplied with, float32 [width]: half octaves below 1, two to a byte."""
    flat = np.asarray(spreads).reshape(-1)[: width // 2]
    return np.take(_halves(), flat).view(np.float32) if len(flat) else np.ones(width, np.float32)


@cache
def _halves() -> np.ndarray:
    """The two numbers that each possible byte stands for, in one element of complex type."""
    halves = np.arange(256)[:, None] >> np.array([0, 4])[None] & 15
    return (2.0 ** ((halves - 15) / 2)).astype(np.float32).view(np.complex64)[:, 0]


@cache
def _of_byte(bits: int) -> np.ndarray:
    """What the codes in each possible byte mean, as float32, those of a byte in one element of complex type."""
    codes = np.arange(256)[:, None] >> np.arange(0, 8, bits)[None] & ((1 << bits) - 1)
    meant = codes.astype(np.float32) - (1.5 if bits == 2 else 0)
    return meant.astype(np.float32).view(np.complex64 if bits == 4 else np.complex128)[:, 0]
