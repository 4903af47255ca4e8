"""Attention state in the canonical frame: what a segment is, wherever it will stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class State:
    """Keys and values of consecutive tokens, float32 [heads, n, dim] for each layer; keys are not rotated."""

    keys: tuple[mx.array, ...]
    values: tuple[mx.array, ...]

    def __len__(self) -> int:
        return int(self.values[0].shape[1])

    def __getitem__(self, span: slice) -> State:
        """The same of some of the tokens."""
        return self._each(lambda x: x[:, span])

    def __add__(self, other: State) -> State:
        return self._both(other, lambda a, b: a + b)

    def __sub__(self, other: State) -> State:
        return self._both(other, lambda a, b: a - b)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.keys, *self.values))

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.keys, *self.values]

    def _each(self, change: Callable[[mx.array], mx.array]) -> State:
        return State(tuple(map(change, self.keys)), tuple(map(change, self.values)))

    def _both(self, other: State, change: Callable[[mx.array, mx.array], mx.array]) -> State:
        return State(tuple(map(change, self.keys, other.keys)), tuple(map(change, self.values, other.values)))


def joined(states: Sequence[State]) -> State:
    """States one behind the other."""
    layers = range(len(states[0].keys))
    return State(
        tuple(mx.concatenate([s.keys[i] for s in states], axis=1) for i in layers),
        tuple(mx.concatenate([s.values[i] for s in states], axis=1) for i in layers),
    )


@dataclass(frozen=True, slots=True)
class PackedState:
    """A state in few bits: `mx.quantize`'s codes, scales and biases of every array, in groups along the last axis."""

    parts: tuple[tuple[mx.array, mx.array, mx.array], ...]
    bits: int
    group: int

    @classmethod
    def of(cls, state: State, bits: int) -> PackedState:
        """Quantised once, from float32. Groups are as long as the dims allow, 64 or 32; what is zero stays zero."""
        group = 64 if all(x.shape[-1] % 64 == 0 for x in state.arrays) else 32
        parts = [mx.quantize(x, group_size=group, bits=bits) for x in state.arrays]
        halves = [
            (codes, scales.astype(mx.float16), biases.astype(mx.float16)) for codes, scales, biases in parts
        ]
        mx.eval(halves)
        return cls(tuple(halves), bits, group)

    def unpacked(self) -> State:
        arrays = [
            mx.dequantize(
                codes,
                scales.astype(mx.float32),
                biases.astype(mx.float32),
                group_size=self.group,
                bits=self.bits,
            )
            for codes, scales, biases in self.parts
        ]
        layers = len(arrays) // 2
        return State(tuple(arrays[:layers]), tuple(arrays[layers:]))

    def __len__(self) -> int:
        return int(self.parts[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for part in self.parts for x in part)
