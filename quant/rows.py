"""Rows: keys and values of tokens as uint32 words, packed or raw, and back."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from agentmem.quant.format import Code, KVFormat, LayerShape


def _pack(x: mx.array, code: Code) -> mx.array:
    """`x` [n, heads, dim] 16-bit -> uint32 [n, code words + scale words]."""
    codes, scales, biases = mx.quantize(x, group_size=code.group, bits=code.bits)
    pairs = mx.stack([scales, biases], axis=-1).view(mx.uint32)
    n = x.shape[0]
    return mx.concatenate([codes.reshape(n, -1), pairs.reshape(n, -1)], axis=1)


@dataclass(frozen=True, slots=True)
class Packed:
    """Keys or values of one layer as `mx.quantize` gives them: codes uint32 [heads, n, words], scales, biases [heads, n, groups].

    Transposed views of packed rows; `code` says how many bits and elements a scale is for.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    code: Code

    def unpacked(self) -> mx.array:
        """[heads, n, dim] of the dtype of `scales`."""
        return mx.dequantize(
            self.codes, self.scales, self.biases, group_size=self.code.group, bits=self.code.bits
        )

    def times(self, x: mx.array, *, transpose: bool) -> mx.array:
        """The product of x [heads, m, dim] with the transpose, or of x [heads, m, n] with the unpacked matrices."""
        return mx.quantized_matmul(
            x, self.codes, self.scales, self.biases, transpose=transpose, group_size=self.code.group,
            bits=self.code.bits,
        )  # fmt: skip


def _parts(words: mx.array, code: Code, heads: int, dim: int, stored: mx.Dtype, out: mx.Dtype) -> Packed:
    """uint32 [n, code words + scale words] -> the same as `Packed`, its scales of dtype `out`.

    The packed words are transposed, not what is unpacked from them: they are an eighth of the bytes.
    """
    n, split = words.shape[0], code.code_words(heads, dim)
    codes = words[:, :split].reshape(n, heads, -1).transpose(1, 0, 2)
    pairs = (
        words[:, split:]
        .view(stored)
        .reshape(n, heads, dim // code.group, 2)
        .transpose(1, 0, 2, 3)
        .astype(out)
    )
    return Packed(codes, pairs[..., 0], pairs[..., 1], code)


@dataclass(frozen=True, slots=True)
class RowCodec:
    """Packs and unpacks the rows of one layer. `stored` is the 16-bit dtype of raw rows, scales and biases."""

    shape: LayerShape
    format: KVFormat
    stored: mx.Dtype

    @property
    def raw_words(self) -> int:
        return self.shape.heads * (self.shape.key_dim + self.shape.value_dim) // 2

    @property
    def key_words(self) -> int:
        keys = self.format.keys
        assert keys is not None
        heads, dim = self.shape.heads, self.shape.key_dim
        return keys.code_words(heads, dim) + keys.scale_words(heads, dim)

    @property
    def packed_words(self) -> int:
        values = self.format.values
        if values is None:
            return self.raw_words
        heads, dim = self.shape.heads, self.shape.value_dim
        return self.key_words + values.code_words(heads, dim) + values.scale_words(heads, dim)

    def pack(self, raw: mx.array) -> mx.array:
        """Raw rows uint32 [n, raw_words] -> packed rows uint32 [n, packed_words]. Row-wise: no row sees another."""
        if not self.format.packs:
            return raw
        assert self.format.keys is not None
        assert self.format.values is not None
        keys, values = self._split(raw)
        return mx.concatenate([_pack(keys, self.format.keys), _pack(values, self.format.values)], axis=1)

    def unpack(self, rows: mx.array, out: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Packed rows uint32 [n, packed_words] -> keys [heads, n, key_dim], values [heads, n, value_dim] of dtype `out`."""
        if not self.format.packs:
            return self.unraw(rows, out)
        keys, values = self.parts(rows, out)
        return keys.unpacked(), values.unpacked()

    def parts(self, rows: mx.array, out: mx.Dtype) -> tuple[Packed, Packed]:
        """Packed rows uint32 [n, packed_words] -> keys and values, with scales of dtype `out`. The format must pack."""
        assert self.format.keys is not None
        assert self.format.values is not None
        shape, split = self.shape, self.key_words
        keys = _parts(rows[:, :split], self.format.keys, shape.heads, shape.key_dim, self.stored, out)
        values = _parts(rows[:, split:], self.format.values, shape.heads, shape.value_dim, self.stored, out)
        return keys, values

    def raw(self, keys: mx.array, values: mx.array) -> mx.array:
        """keys [heads, n, key_dim], values [heads, n, value_dim] -> raw rows uint32 [n, raw_words]; rounds to 16 bits."""
        n = keys.shape[1]
        flat = [x.astype(self.stored).transpose(1, 0, 2).reshape(n, -1) for x in (keys, values)]
        return mx.concatenate(flat, axis=1).view(mx.uint32)

    def unraw(self, rows: mx.array, out: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Raw rows uint32 [n, raw_words] -> keys [heads, n, key_dim], values [heads, n, value_dim] of dtype `out`."""
        keys, values = self._split(rows)
        return keys.transpose(1, 0, 2).astype(out), values.transpose(1, 0, 2).astype(out)

    def _split(self, raw: mx.array) -> tuple[mx.array, mx.array]:
        """Raw rows -> 16-bit keys [n, heads, key_dim] and values [n, heads, value_dim]."""
        n, shape = raw.shape[0], self.shape
        flat = raw.view(self.stored)
        split = shape.heads * shape.key_dim
        keys = flat[:, :split].reshape(n, shape.heads, shape.key_dim)
        return keys, flat[:, split:].reshape(n, shape.heads, shape.value_dim)
