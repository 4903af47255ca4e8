"""Recurrent layers: arrays of constant size that stand for all tokens so far, kept bit for bit as the model has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

WORD = 4
Shape = tuple[tuple[int, ...], mx.Dtype] | None


@dataclass(frozen=True, slots=True)
class RecurrentLayer:
    """`shapes` of its arrays without the batch axis, and their types; None for one that stays empty."""

    shapes: tuple[Shape, ...]

    def empty(self) -> RecurrentState:
        """Before the first token."""
        return RecurrentState(self, None)

    def most_words(self) -> int:
        return sum(_words(shape) for shape in self.shapes)

    def words(self, tokens: int) -> int:
        """Words of a checkpoint behind `tokens` tokens: as many behind any."""
        return self.most_words() if tokens else 0

    def unpacked(self, words: mx.array, tokens: int) -> RecurrentState:
        """What `RecurrentState.packed` made."""
        if not tokens:
            return self.empty()
        arrays: list[mx.array | None] = []
        at = 0
        for shape in self.shapes:
            size = _words(shape)
            arrays.append(_of_words(words[at : at + size], shape) if shape is not None else None)
            at += size
        return RecurrentState(self, tuple(arrays))


@dataclass(frozen=True, slots=True, eq=False)
class RecurrentState:
    """The arrays of one sequence, [1, ...] each; None before the first token."""

    layer: RecurrentLayer
    held: tuple[mx.array | None, ...] | None

    def arrays(self) -> list[mx.array]:
        return [a for a in self.held or () if a is not None]

    def packed(self) -> mx.array:
        """uint32 [words], lazily."""
        flat = [_to_words(a) for a in self.arrays()]
        return mx.concatenate([mx.zeros((0,), mx.uint32), *flat])

    def view(self, _: object) -> ArraysCache:
        """The model's own kind of cache, with these arrays."""
        cache = ArraysCache(len(self.layer.shapes))
        if self.held is not None:
            for number, array in enumerate(self.held):
                cache[number] = array
        return cache


def joined(layer: RecurrentLayer, states: Sequence[RecurrentState]) -> ArraysCache:
    """A cache over several sequences, all of which have been fed something."""
    cache = ArraysCache(len(layer.shapes))
    for number in range(len(layer.shapes)):
        held = [s.held[number] for s in states if s.held is not None]
        arrays = [a for a in held if a is not None]
        if arrays:
            cache[number] = arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)
    return cache


def states_of(layer: RecurrentLayer, cache: Any) -> list[RecurrentState]:
    """The states of the sequences of a cache that the model has run with."""
    arrays = [cache[number] for number in range(len(layer.shapes))]
    count = next(a.shape[0] for a in arrays if a is not None)
    return [
        RecurrentState(layer, tuple(None if a is None else a[i : i + 1] for a in arrays))
        for i in range(count)
    ]


def recurrent_shapes(caches: Sequence[Any]) -> list[tuple[Shape, ...]]:
    """Shapes of the arrays of each recurrent cache that the model has run with over one sequence."""
    return [
        tuple(None if a is None else (tuple(a.shape[1:]), a.dtype) for a in cache.cache) for cache in caches
    ]


def _words(shape: Shape) -> int:
    return 0 if shape is None else -(-prod(shape[0]) * shape[1].size // WORD)


def _to_words(array: mx.array) -> mx.array:
    flat = array.reshape(-1).view(mx.uint8)
    return mx.pad(flat, (0, -flat.size % WORD)).view(mx.uint32)


def _of_words(words: mx.array, shape: tuple[tuple[int, ...], mx.Dtype]) -> mx.array:
    sizes, dtype = shape
    size = prod(sizes) * dtype.size
    return words.view(mx.uint8)[:size].view(dtype).reshape(1, *sizes)
