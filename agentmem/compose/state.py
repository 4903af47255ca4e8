"""Attention state in the canonical frame: what a segment is, wherever it will stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

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
