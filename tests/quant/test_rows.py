"""Rows: what packing keeps, what it costs, and that no row sees another."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.quant.format import FORMATS, LayerShape, kv_format, stored_dtype
from agentmem.quant.rows import RowCodec
from agentmem.quant.selftest import code_error

PACKING = sorted(name for name, f in FORMATS.items() if f.packs)
SHAPES = [LayerShape(2, 64, 64), LayerShape(1, 128, 64), LayerShape(3, 32, 96), LayerShape(8, 128, 128)]


def codec(name: str, shape: LayerShape = SHAPES[0], stored: mx.Dtype = mx.float16) -> RowCodec:
    return RowCodec(shape, kv_format(name).for_shape(shape), stored)


def rows_of(c: RowCodec, n: int, seed: int = 0) -> mx.array:
    """Raw rows whose size differs from row to row, so that a shared scale would show."""
    keys, values = (
        mx.random.normal((c.shape.heads, n, dim), key=mx.random.key(seed + i))
        for i, dim in enumerate((c.shape.key_dim, c.shape.value_dim))
    )
    size = mx.exp(mx.random.normal((1, n, 1), key=mx.random.key(seed + 2)) * 2)
    return c.raw(keys * size, values * size)


@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PACKING)
def test_unpack_gives_back_every_element_within_its_quantisation_step(
    name: str, shape: LayerShape, stored: mx.Dtype
) -> None:
    c = codec(name, shape, stored)
    raw = rows_of(c, 9)
    packed = c.pack(raw)
    assert packed.shape == (9, c.packed_words)
    assert packed.dtype == mx.uint32
    for original, unpacked, code in zip(
        c.unraw(raw, mx.float32), c.unpack(packed, mx.float32), (c.format.keys, c.format.values), strict=True
    ):
        assert original.shape == unpacked.shape
        assert code is not None
        x, y = np.array(original).reshape(-1, code.group), np.array(unpacked).reshape(-1, code.group)
        step = np.ptp(x, axis=1, keepdims=True) / (2**code.bits - 1)
        # 16-bit scales and biases round too, in proportion to the largest element.
        rounding = np.abs(x).max(1, keepdims=True) * (2**-7 if stored == mx.bfloat16 else 2**-9)
        assert (np.abs(x - y) <= 1.5 * step + rounding).all()


@given(cuts=st.lists(st.integers(1, 39), unique=True, max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", PACKING)
def test_rows_packed_apart_or_together_have_the_same_bits(name: str, cuts: list[int], seed: int) -> None:
    c = codec(name)
    raw = rows_of(c, 40, seed)
    together = np.array(c.pack(raw))
    edges = [0, *sorted(cuts), 40]
    apart = np.concatenate([np.array(c.pack(raw[a:b])) for a, b in pairwise(edges)])
    assert np.array_equal(together, apart)


def test_unpacking_a_row_alone_gives_what_unpacking_all_gives() -> None:
    c = codec("q4-plain", LayerShape(3, 32, 96))
    packed = c.pack(rows_of(c, 12))
    keys, values = c.unpack(packed, mx.float32)
    for i in (0, 5, 11):
        k, v = c.unpack(packed[i : i + 1], mx.float32)
        assert np.array_equal(np.array(k), np.array(keys[:, i : i + 1]))
        assert np.array_equal(np.array(v), np.array(values[:, i : i + 1]))


@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_raw_rows_keep_every_16_bit_value(shape: LayerShape, stored: mx.Dtype) -> None:
    c = codec("fp16", shape, stored)
    keys = mx.random.normal((shape.heads, 7, shape.key_dim)).astype(stored)
    values = (mx.random.normal((shape.heads, 7, shape.value_dim)) * 100).astype(stored)
    rows = c.raw(keys, values)
    assert rows.shape == (7, c.raw_words)
    k, v = c.unraw(rows, stored)
    assert mx.array_equal(k, keys).item()
    assert mx.array_equal(v, values).item()
    again = c.raw(k.astype(mx.float32), v.astype(mx.float32))
    assert mx.array_equal(again, rows).item()


def test_raw_rounds_float32_to_the_stored_type() -> None:
    c = codec("fp16")
    x = mx.full((2, 1, 64), 1.0 + 2**-14)
    k, _ = c.unraw(c.raw(x, x), mx.float32)
    assert (np.array(k) == 1.0).all()


def test_fp16_format_does_not_touch_rows() -> None:
    c = codec("fp16")
    raw = rows_of(c, 5)
    assert c.packed_words == c.raw_words
    assert mx.array_equal(c.pack(raw), raw).item()
    for a, b in zip(c.unpack(raw, mx.float32), c.unraw(raw, mx.float32), strict=True):
        assert mx.array_equal(a, b).item()


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("q4", 0.28125),
        ("q3", 0.21875),
        ("q4-plain", 0.28125),
        ("q4-rotated", 0.28125),
        ("q8-plain", 0.53125),
        ("k8v4-plain", 0.40625),
        ("fp16", 1.0),
    ],
)
def test_bytes_of_a_packed_row(name: str, ratio: float) -> None:
    c = codec(name, LayerShape(3, 64, 64))
    elements = 3 * (64 + 64)
    assert c.raw_words * 4 == elements * 2
    assert c.packed_words * 4 == elements * 2 * ratio


def test_a_packed_row_of_q4_costs_nine_sixteenths_of_a_byte_per_element() -> None:
    c = codec("q4-plain", LayerShape(1, 64, 64))
    assert c.packed_words * 4 / 128 == 0.5625
    assert c.pack(rows_of(c, 10)).nbytes == 10 * 128 * 0.5625


@pytest.mark.parametrize("name", [*PACKING, "fp16"])
def test_code_error_is_small_for_sound_packing(name: str) -> None:
    c = codec(name)
    assert code_error(c, rows_of(c, 30)) <= 1.5


def test_stored_dtype_follows_the_model() -> None:
    assert stored_dtype(mx.bfloat16) == mx.bfloat16
    assert stored_dtype(mx.float16) == mx.float16
    assert stored_dtype(mx.float32) == mx.float16
