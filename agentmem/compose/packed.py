"""Packed attention state: a segment in 8 bits, an offset in 2, unpacked when a prompt is put together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from agentmem.compose.state import State
from agentmem.quant.device import backend
from agentmem.quant.format import LayerShape

AT_ONCE = 128
"""Rows that are unpacked together on a CPU."""
IN_CACHE = 1 << 21
"""Bytes of rows that are gone over while they are in a core's cache."""
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
        return State(Samples.of([self]).rows(), self.shapes)

    def __len__(self) -> int:
        return int(self.codes.shape[0])

    @property
    def spreads(self) -> mx.array:
        """Of 2 bits: uint8 [width / 2], two to a byte."""
        return _flat(self.biases, self.width)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return int(self.codes.shape[1]) * 32 // self.bits

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes + self.biases.nbytes)


@dataclass(frozen=True, slots=True)
class Samples:
    """Tokens of several packed states, one behind the other, so that they are unpacked together.

    `counts` are of `states`. codes and scales [m, ...] are as in a packed state, biases [m, groups] too; with 2 bits they are
    the spreads of each state, uint8 [states, width / 2].
    """

    states: tuple[PackedState, ...]
    counts: tuple[int, ...]
    codes: mx.array
    scales: mx.array
    biases: mx.array

    @classmethod
    def of(cls, states: Sequence[PackedState], at: Sequence[np.ndarray] | None = None) -> Samples:
        """All tokens of the states, or those `at` places of each."""
        assert len({s.bits for s in states}) == 1
        whole = at is None or all(len(a) == len(s) for a, s in zip(at, states, strict=True))
        chosen = [...] * len(states) if at is None or whole else [mx.array(a) for a in at]
        counts = [len(s) if at is None or whole else len(at[i]) for i, s in enumerate(states)]

        def together(parts: list[mx.array]) -> mx.array:
            return parts[0] if len(parts) == 1 else mx.concatenate(parts)

        codes = together([s.codes[c] for s, c in zip(states, chosen, strict=True)])
        scales = together([s.scales[c] for s, c in zip(states, chosen, strict=True)])
        if states[0].bits == 2:
            biases = together([s.spreads[None] for s in states])
        else:
            biases = together([s.biases[c] for s, c in zip(states, chosen, strict=True)])
        return cls(tuple(states), tuple(counts), codes, scales, biases)

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes + self.biases.nbytes)

    def rows(self) -> mx.array:
        """Unpacked: float32 [m, width]."""
        if backend() != "cpu":
            return self._on_device()
        out = mx.zeros((len(self), self.states[0].width))
        mx.eval(out)
        self._on_host().unpack(0, np.asarray(out))  # a view: a copy would take as long again
        return out

    def weighed(self, weights: mx.array) -> mx.array:
        """float32 [n, m] -> [n, width]. On a CPU some rows after others: what is unpacked stays in the processor's cache, and the
        next ones are meanwhile."""
        if backend() != "cpu":
            return weights @ self.rows()
        out, host = mx.zeros((weights.shape[0], self.states[0].width)), self._on_host()
        parts = [(i, min(i + AT_ONCE, len(self))) for i in range(0, len(self), AT_ONCE)]
        ready = [_beside().submit(host.unpacked, *parts[0])] if parts else []
        for number, (i, j) in enumerate(parts):
            rows = ready.pop().result()
            if number + 1 < len(parts):
                ready.append(_beside().submit(host.unpacked, *parts[number + 1]))
            out = mx.addmm(out, weights[:, i:j], mx.array(rows))
            mx.eval(out)
        return out

    def _on_host(self) -> _Host:
        arrays = (np.asarray(a) for a in (self.codes, self.scales, self.biases))
        return _Host(self.states[0].bits, self.counts, *arrays)

    def _on_device(self) -> mx.array:
        bits, scales = self.states[0].bits, self.scales.astype(mx.float32)
        rows = mx.dequantize(
            self.codes, scales, -1.5 * scales if bits == 2 else self.biases.astype(mx.float32),
            group_size=32 * self.codes.shape[1] // (bits * self.scales.shape[1]), bits=bits,
        )  # fmt: skip
        if bits != 2:
            return rows
        halves = mx.array(_halves().view(np.float32).reshape(256, 2))
        spread = halves[self.biases.astype(mx.int32)].reshape(len(self.states), -1)
        if len(self.states) == 1:
            return rows * spread
        return rows * spread[mx.array(np.repeat(np.arange(len(self.states)), self.counts))]


@dataclass(frozen=True, slots=True)
class _Host:
    """Samples in the host's memory, for any thread."""

    bits: int
    counts: tuple[int, ...]
    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    def unpacked(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, float32."""
        rows = np.empty((stop - start, self.codes.shape[1] * 32 // self.bits), np.float32)
        self.unpack(start, rows)
        return rows

    def unpack(self, start: int, rows: np.ndarray) -> None:
        """Fill rows float32 [n, width] with those from `start` on. MLX unpacks on a CPU one element after the other, in several
        times the time."""
        few = max(1, IN_CACHE // (4 * rows.shape[1]))  # each is gone over several times
        for at in range(0, len(rows), few):
            self._unpack(start + at, rows[at : at + few])

    def _unpack(self, start: int, rows: np.ndarray) -> None:
        stop = start + len(rows)
        codes, scales = self.codes[start:stop].view(np.uint8), self.scales[start:stop].astype(np.float32)
        grouped = rows.reshape(*scales.shape, -1)
        if self.bits == 8:
            np.copyto(rows, codes)
        else:
            meant = _of_byte(self.bits)
            np.take(meant, codes, out=rows.view(meant.dtype), mode="clip")
        grouped *= scales[:, :, None]
        if self.bits != 2:
            grouped += self.biases[start:stop].astype(np.float32)[:, :, None]
            return
        at = 0
        for spreads, count in zip(self.biases, self.counts, strict=True):
            first, last = max(at, start) - start, min(at + count, stop) - start
            if first < last:
                rows[first:last] *= _spread(spreads)
            at += count


@cache
def _beside() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "unpack")


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
    grouped = (rows / mx.array(_spread(np.asarray(_flat(biases, width))))).reshape(n, width // group, group)
    scales = (STEP * mx.sqrt((grouped**2).mean(axis=2))).astype(mx.float16)
    steps = grouped / mx.maximum(scales.astype(mx.float32), 1e-12)[:, :, None]
    codes = mx.clip(mx.round(steps + 1.5), 0, 3).astype(mx.uint32).reshape(n, width // 16, 16)
    return (codes << (2 * mx.arange(16, dtype=mx.uint32))).sum(axis=2), scales, biases


def _flat(spreads: mx.array, width: int) -> mx.array:
    """Spreads as one row; of no tokens there are none, and all elements alike."""
    return spreads.reshape(-1)[: width // 2] if spreads.size else mx.full((width // 2,), 255, mx.uint8)


def _spread(spreads: np.ndarray) -> np.ndarray:
    """What elements are multiplied with, float32 [width]: half octaves below 1, two to a byte."""
    return np.take(_halves(), spreads).view(np.float32)


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
