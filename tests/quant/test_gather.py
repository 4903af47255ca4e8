"""The gathered path's kernel gives what the codec itself unpacks: on a GPU as it is, on a CPU thread by thread."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from agentmem.quant.device import backend
from agentmem.quant.format import Code, KVFormat, LayerShape
from agentmem.quant.gather import gather
from agentmem.quant.rows import RowCodec
from tests.quant.emulated import device

pytestmark = pytest.mark.skipif(
    backend() == "cpu" and device.COMPILER is None, reason="neither a GPU nor a C++ compiler"
)

PACKED, RAW, TAILED, FRESH = 5, 3, 2, 4


@dataclass
class Scattered:
    """Rows whose places in the arena have nothing to do with their order."""

    arena: mx.array
    offsets: mx.array
    tail: mx.array
    packed: int = PACKED
    raw: int = RAW

    def packed_rows(self) -> mx.array | None:
        raise NotImplementedError

    def raw_blocks(self) -> list[mx.array]:
        raise NotImplementedError


def scattered(codec: RowCodec, packed: mx.array, raw: mx.array, tail: mx.array) -> Scattered:
    rng = np.random.default_rng(0)
    arena = rng.integers(0, 1 << 32, (PACKED + 6 * RAW, codec.packed_words), dtype=np.uint32)
    words = arena.reshape(-1)
    offsets = [int(i) * codec.packed_words for i in rng.permutation(PACKED)]
    offsets += [PACKED * codec.packed_words + int(i) * codec.raw_words for i in rng.permutation(RAW)]
    for row, at in zip([*np.array(packed), *np.array(raw)], offsets, strict=True):
        words[at : at + len(row)] = row
    return Scattered(mx.array(arena), mx.array(np.array(offsets, np.uint32)), tail)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "keys", "values", "group"), [(1, 4, 4, 64), (2, 8, 4, 32), (2, 3, 3, 64), (1, 8, 3, 32)]
)
def test_stored_rows_and_a_chunk_become_whole(
    heads: int, keys: int, values: int, group: int, stored: mx.Dtype
) -> None:
    shape = LayerShape(heads, 64, 128)
    codec = RowCodec(shape, KVFormat("test", Code(keys, group), Code(values, group)), stored)
    k, v = (mx.random.normal((1, heads, 14, dim), key=mx.random.key(dim)) for dim in (64, 128))
    raw = codec.raw(k[0], v[0])
    rows = scattered(codec, codec.pack(raw[:PACKED]), raw[PACKED:8], raw[8:10])
    attend = device.gather if backend() == "cpu" else gather
    got_keys, got_values, new_rows = map(np.array, attend(codec, rows, k[:, :, 10:], v[:, :, 10:]))
    packed, held = codec.unpack(codec.pack(raw[:PACKED]), mx.float32), codec.unraw(raw[PACKED:10], mx.float32)
    for i, (got, chunk) in enumerate(((got_keys, k), (got_values, v))):
        np.testing.assert_allclose(got[0, :, :PACKED], np.array(packed[i]), atol=1e-5)
        assert np.array_equal(got[0, :, PACKED:10], np.array(held[i]))
        assert np.array_equal(got[0, :, 10:], np.array(chunk[0, :, 10:]))
    assert np.array_equal(new_rows, np.array(raw[10:]))
