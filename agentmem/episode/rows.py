"""Rows of one KV head: a token's key and value in that head, whole or packed, as one array that each head is cut from alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from agentmem.quant.format import Code, LayerShape
from agentmem.quant.keymap import KeyMap
from agentmem.quant.rows import Packed, RowCodec


class HeadCodec(Protocol):
    """Keys, as the layer's key map leaves them, and values [heads, n, dim] as rows [heads, n, width], and back."""

    def rows(self, keys: mx.array, values: mx.array) -> mx.array: ...

    def parts(self, rows: mx.array, out: mx.Dtype) -> tuple[mx.array, mx.array]: ...


@dataclass(frozen=True, slots=True)
class Whole:
    """Rows that are not packed: elements of `dtype`, the key's before the value's."""

    shape: LayerShape
    dtype: mx.Dtype

    def rows(self, keys: mx.array, values: mx.array) -> mx.array:
        return mx.concatenate([keys, values], axis=-1).astype(self.dtype)

    def parts(self, rows: mx.array, out: mx.Dtype) -> tuple[mx.array, mx.array]:
        split = self.shape.key_dim
        return rows[..., :split].astype(out), rows[..., split:].astype(out)


@dataclass(frozen=True, slots=True)
class PackedHeads:
    """Rows uint32 in a KV format: of each head its key codes, key scales and biases, value codes, value scales and biases.

    A format's row has all heads side by side; codes and scales lie within a head, so that cutting it up moves words and changes
    none. Heads can then keep rows of different tokens, and no row is ever packed twice.
    """

    codec: RowCodec

    def rows(self, keys: mx.array, values: mx.array) -> mx.array:
        return self.split(self.codec.pack(self.codec.raw(keys, values)))

    def split(self, packed: mx.array) -> mx.array:
        """A format's packed rows uint32 [n, packed_words] -> [heads, n, words of a head]."""
        n, heads = packed.shape[0], self.codec.shape.heads
        cuts, at = [], 0
        for width in self._widths():
            cuts.append(packed[:, at : at + heads * width].reshape(n, heads, width))
            at += heads * width
        return mx.contiguous(mx.concatenate(cuts, axis=2).transpose(1, 0, 2))

    def joined(self, rows: mx.array) -> mx.array:
        """The inverse of `split`, for rows of the same tokens in every head."""
        n = rows.shape[1]
        cuts, at = [], 0
        for width in self._widths():
            cuts.append(rows[:, :, at : at + width].transpose(1, 0, 2).reshape(n, -1))
            at += width
        return mx.concatenate(cuts, axis=1)

    def parts(self, rows: mx.array, out: mx.Dtype) -> tuple[mx.array, mx.array]:
        key_codes, key_pairs, value_codes, _ = self._widths()
        half = key_codes + key_pairs
        keys, values = self._codes()
        return (
            self._unpacked(rows[..., :key_codes], rows[..., key_codes:half], keys, out),
            self._unpacked(
                rows[..., half : half + value_codes], rows[..., half + value_codes :], values, out
            ),
        )

    def _unpacked(self, codes: mx.array, pairs: mx.array, code: Code, out: mx.Dtype) -> mx.array:
        scales = mx.contiguous(pairs).view(self.codec.stored).reshape(*pairs.shape, 2).astype(out)
        return Packed(mx.contiguous(codes), scales[..., 0], scales[..., 1], code).unpacked()

    def _codes(self) -> tuple[Code, Code]:
        keys, values = self.codec.format.keys, self.codec.format.values
        assert keys is not None
        assert values is not None
        return keys, values

    def _widths(self) -> tuple[int, int, int, int]:
        """Words of one head: key codes, key scales and biases, value codes, value scales and biases."""
        (keys, values), shape = self._codes(), self.codec.shape
        return (
            keys.code_words(1, shape.key_dim), keys.scale_words(1, shape.key_dim),
            values.code_words(1, shape.value_dim), values.scale_words(1, shape.value_dim),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How one layer's rows are held: `lead` for pinned sinks, which no format packs, `body` for all others.

    All keys of one softmax go through `key_map`, packed or not.
    """

    shape: LayerShape
    lead: HeadCodec
    body: HeadCodec
    key_map: KeyMap


def whole_kinds(shapes: Sequence[LayerShape], dtype: mx.Dtype) -> list[LayerKind]:
    """Layers whose rows stay in the model's `dtype`."""
    return [LayerKind(s, Whole(s, dtype), Whole(s, dtype), KeyMap()) for s in shapes]


def kinds_of(codecs: Sequence[RowCodec], key_maps: Sequence[KeyMap]) -> list[LayerKind]:
    """Layers in a KV format, as the engine lays them out; formats that pack nothing hold 16 bits."""
    return [
        LayerKind(
            c.shape,
            Whole(c.shape, c.stored),
            PackedHeads(c) if c.format.packs else Whole(c.shape, c.stored),
            key_map,
        )
        for c, key_map in zip(codecs, key_maps, strict=True)
    ]
