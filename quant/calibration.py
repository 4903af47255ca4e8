"""Calibration: what a format takes off a model's keys before it packs them, measured once on a short text.

Every KV head of every layer gets the mean of its keys and a scale per channel, sqrt(deviation of keys / size of queries): it
evens out how much an error in a channel matters to the scores. Both are rounded coarsely, so that machines whose arithmetic
differs in the last bits mostly find the same values; that costs less than can be measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from agentmem.quant.format import WORD_BITS, Code, KVFormat, LayerShape
from agentmem.quant.keymap import CalibratedMap
from agentmem.quant.rows import RowCodec

VERSION = 1
"""Changes with everything that decides the values but the model: text, positions, arithmetic."""

LARGEST_EXPONENT = 8
"""Scales lie between 2^-8 and 2^8, so that a half-precision matrix holds them."""

WIDE_BITS = 8
TOLERATED_NOISE = 1.0
"""Deviation of a score, in nats, above which the keys of a layer get `WIDE_BITS` bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """What one layer's keys go through: `mean` and `scale` float32 [heads, key_dim], scales powers of two.

    `noise`: what packing the keys does to the scores even so, see `score_noise`.
    """

    mean: np.ndarray
    scale: np.ndarray
    noise: float = 0.0

    @property
    def wide(self) -> bool:
        """Whether the keys lose too much, and keep `WIDE_BITS` bits."""
        return self.noise > TOLERATED_NOISE

    def fits(self, shape: LayerShape) -> bool:
        """Whether the values are sound and those of a layer of this shape."""
        exponents = np.log2(np.where(self.scale > 0, self.scale, np.nan))
        return (
            self.mean.shape == self.scale.shape == (shape.heads, shape.key_dim)
            and self.mean.dtype == self.scale.dtype == np.float32
            and bool(np.isfinite(self.mean).all())
            and 0 <= self.noise < np.inf
            and bool((np.abs(exponents) <= LARGEST_EXPONENT).all() and (exponents % 1 == 0).all())
        )


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The corrections of a model, one a layer."""

    layers: tuple[Correction, ...]

    @property
    def digest(self) -> str:
        """sha256 of the values, for the fingerprint: rows that other values made are other rows."""
        state = hashlib.sha256(f"{VERSION}".encode())
        for layer in self.layers:
            state.update(f"{layer.mean.shape}{layer.wide}".encode())
            state.update(layer.mean.tobytes())
            state.update(layer.scale.tobytes())
        return state.hexdigest()

    def tensors(self) -> dict[str, np.ndarray]:
        """The content of a file; see `from_tensors`."""
        out: dict[str, np.ndarray] = {"digest": np.frombuffer(bytes.fromhex(self.digest), np.uint8)}
        for i, layer in enumerate(self.layers):
            noise = np.array([layer.noise], np.float32)
            out |= {f"mean.{i}": layer.mean, f"scale.{i}": layer.scale, f"noise.{i}": noise}
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], shapes: Sequence[LayerShape]) -> Calibration:
        """Raises ValueError where a file does not hold what `tensors` made for layers of these shapes."""
        try:
            layers = tuple(
                Correction(tensors[f"mean.{i}"], tensors[f"scale.{i}"], float(tensors[f"noise.{i}"].item()))
                for i in range(len(shapes))
            )
            digest = tensors["digest"].tobytes().hex()
        except KeyError as error:
            raise ValueError(f"{error} is missing") from None
        made = cls(layers)
        if not all(layer.fits(shape) for layer, shape in zip(layers, shapes, strict=True)):
            raise ValueError("the values are not those of this model's layers")
        if digest != made.digest:
            raise ValueError("the checksum does not match")
        return made


def corrected(keys: mx.array, queries: mx.array, *, scale: float, code: Code, stored: mx.Dtype) -> Correction:
    """The correction for keys [heads, n, dim] and queries [query heads, m, dim] of one layer, as the model gave them.

    `scale` is that of the scores, `code` how keys are packed, `stored` the 16-bit type they have before that.
    """
    keys = keys.astype(mx.float32)
    heads, _, dim = keys.shape
    queries = queries.astype(mx.float32).reshape(heads, -1, dim)
    mean, deviation = np.array(keys.mean(1)), np.array(mx.sqrt(keys.var(1)))
    size = np.array(mx.sqrt(mx.square(queries).mean(1)))
    deviation, size = np.maximum(deviation, 1e-6), np.maximum(size, 1e-6)
    exponent = np.round(np.log2(deviation / size) / 2)
    scales = np.exp2(np.clip(exponent, -LARGEST_EXPONENT, LARGEST_EXPONENT)).astype(np.float32)
    # 16-bit keys know no finer steps than a small part of their mean.
    step = np.exp2(np.round(np.log2(np.maximum(deviation, np.abs(mean) / 128))) - 2)
    means = (np.round(mean / step) * step).astype(np.float32)
    noise = score_noise(CalibratedMap(means, scales, mx.float32), keys, queries, scale, code, stored)
    return Correction(means, scales, round(noise, 2))


def score_noise(
    key_map: CalibratedMap, keys: mx.array, queries: mx.array, scale: float, code: Code, stored: mx.Dtype
) -> float:
    """Root mean square error of the scores of the worst head, in nats, that packing the keys makes.

    keys [heads, n, dim] and queries [heads, m, dim] in float32. What all keys have in common is not counted: softmax does
    not see it.
    """
    mapped = key_map.keys(keys[None])[0].astype(stored)
    codes, scales, biases = mx.quantize(mapped, group_size=code.group, bits=code.bits)
    packed = mx.dequantize(codes, scales, biases, group_size=code.group, bits=code.bits)
    error = packed.astype(mx.float32) - mapped.astype(mx.float32)
    error = error - error.mean(1, keepdims=True)
    asked = key_map.queries(queries[None])[0]
    covariance = error.swapaxes(1, 2) @ error / error.shape[1]
    sizes = asked.swapaxes(1, 2) @ asked / asked.shape[1]
    variance = mx.maximum((covariance * sizes).sum((1, 2)), 0.0)
    return scale * float(np.sqrt(np.array(variance)).max())


def wide_format(format: KVFormat, bits: int = WIDE_BITS) -> KVFormat:
    """The format of a layer whose keys need more bits."""
    assert format.keys is not None
    return replace(format, keys=Code(max(bits, format.keys.bits), format.keys.group))


def spare_layers(codecs: Sequence[RowCodec], noises: Sequence[float]) -> list[int]:
    """Which layers of one format get its spare bits: those with the most noise, as long as all of them keep to `most_bits`."""
    elements = sum(c.shape.heads * (c.shape.key_dim + c.shape.value_dim) for c in codecs)
    room = codecs[0].format.most_bits * elements - sum(WORD_BITS * c.packed_words for c in codecs)
    chosen = []
    for i in sorted(range(len(codecs)), key=lambda i: (-noises[i], i)):
        format = codecs[i].format
        more = (
            replace(codecs[i], format=wide_format(format, format.spare_bits)).packed_words
            - codecs[i].packed_words
        )
        if 0 < WORD_BITS * more <= room:
            room -= WORD_BITS * more
            chosen.append(i)
    return sorted(chosen)
