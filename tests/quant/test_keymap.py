"""Key maps leave attention's weights alone, in every type and for every head dim."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from agentmem.quant.attention import reference_path
from agentmem.quant.format import LayerShape, kv_format
from agentmem.quant.keymap import CalibratedMap, KeyMap, hadamard
from agentmem.quant.rows import RowCodec
from agentmem.quant.selftest import _Stored

DIMS = [32, 64, 72, 80, 96, 112, 128, 256]


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def calibrated(heads: int, dim: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> CalibratedMap:
    """A map with large means and scales of many sizes."""
    rng = np.random.default_rng(seed)
    mean = np.round(rng.normal(0, 8, (heads, dim))).astype(np.float32)
    return CalibratedMap(mean, np.exp2(rng.integers(-3, 4, (heads, dim))).astype(np.float32), dtype)


def weights(queries: mx.array, keys: mx.array) -> np.ndarray:
    """Attention's weights in float64: queries [B, H, n, D], keys [B, H_kv, S, D] -> [B, H, n, S]."""
    q, k = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (queries, keys))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


@pytest.mark.parametrize("dim", [*DIMS, 8, 36, 160])
def test_hadamard_rows_are_orthogonal(dim: int) -> None:
    signs, block = hadamard(dim)
    assert np.array_equal(signs @ signs.T, block * np.eye(dim))
    assert np.isin(signs, [-1, 0, 1]).all()


@pytest.mark.parametrize(
    ("dim", "block"), [(64, 64), (80, 80), (96, 96), (112, 112), (72, 8), (36, 4), (33, 1)]
)
def test_blocks_are_as_long_as_a_matrix_is_known_for(dim: int, block: int) -> None:
    assert hadamard(dim)[1] == block


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_are_those_of_the_keys_that_came(dim: int, batch: int) -> None:
    """Queries of three heads share a KV head; each of those has means and scales of its own."""
    key_map = calibrated(2, dim)
    queries, keys = normal(1, batch, 6, 5, dim), normal(2, batch, 2, 40, dim) * 3 + 5
    mapped = key_map.keys(keys)
    assert mapped.shape == keys.shape
    assert key_map.queries(queries).shape == queries.shape
    assert float(mx.abs(mapped - keys).max()) > 1
    np.testing.assert_allclose(
        weights(key_map.queries(queries), mapped), weights(queries, keys), atol=3e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_half_precision_costs_one_rounding(dtype: mx.Dtype, dim: int) -> None:
    """Mapped keys and queries are off by at most half a unit in the last place of what float32 gives."""
    key_map, wide = calibrated(2, dim, dtype), calibrated(2, dim)
    keys, queries = (normal(2, 1, 2, 40, dim) * 3).astype(dtype), normal(1, 1, 6, 5, dim).astype(dtype)
    shift = wide.keys(mx.zeros((1, 2, 1, dim)))
    unit = 2.0**-8 if dtype == mx.bfloat16 else 2.0**-11
    for got, want, slack in (
        (key_map.keys(keys), wide.keys(keys.astype(mx.float32)), mx.abs(shift) * unit),
        (key_map.queries(queries), wide.queries(queries.astype(mx.float32)), mx.array(0.0)),
    ):
        assert got.dtype == dtype
        bound = mx.abs(want) * unit + slack + 1e-5
        assert mx.all(mx.abs(got.astype(mx.float32) - want) <= bound).item()


def test_keys_far_from_zero_are_packed_around_it() -> None:
    """Keys with large means and channels of very different size: the map takes off most of what packing loses."""
    shape = LayerShape(2, 64, 64)
    codec = RowCodec(shape, kv_format("q4").for_shape(shape), mx.float16)
    rng = np.random.default_rng(0)
    mean = np.round(rng.normal(0, 20, (2, 64))).astype(np.float32)
    scale = np.exp2(rng.integers(-3, 4, (2, 64))).astype(np.float32)
    keys = mx.array(mean[:, None]) + normal(2, 2, 200, 64) * mx.array(scale[:, None])
    queries = normal(3, 1, 2, 50, 64) / mx.array(scale[:, None])

    def lost(key_map: KeyMap) -> float:
        mapped = key_map.keys(keys[None])
        rows = codec.raw(mapped[0], mapped[0])
        packed, _ = codec.unpack(codec.pack(rows), mx.float32)
        asked = key_map.queries(queries)
        return float(np.abs(weights(asked, packed[None]) - weights(queries, keys[None])).mean())

    assert lost(CalibratedMap(mean, scale, mx.float32)) < 0.1 * lost(KeyMap())


def test_raw_rows_tail_and_chunk_go_through_one_map() -> None:
    """A path over mapped rows gives what attention over the keys themselves gives, packing aside."""
    shape = LayerShape(2, 64, 64)
    codec = RowCodec(shape, kv_format("fp16").for_shape(shape), mx.float16)
    key_map = calibrated(2, 64)
    old, values, queries = normal(4, 1, 2, 79, 64), normal(5, 1, 2, 79, 64), normal(6, 1, 4, 3, 64)
    keys, new = normal(7, 1, 2, 3, 64), normal(8, 1, 2, 3, 64)

    def attend(one: KeyMap) -> mx.array:
        rows = codec.raw(one.keys(old)[0], values[0])
        stored = _Stored(codec, rows[:-4], rows[-4:])
        out, _ = reference_path(codec, stored, one.queries(queries), one.keys(keys), new, scale=0.125)
        return out

    assert float(mx.abs(attend(key_map) - attend(KeyMap())).max()) < 0.02


def test_the_plain_map_changes_nothing_and_unknown_ones_are_refused() -> None:
    x = normal(1, 1, 2, 3, 64)
    assert KeyMap().keys(x) is x
    assert KeyMap().queries(x) is x
    with pytest.raises(ValueError, match="unknown rotation 'spiral'"):
        KeyMap("spiral").keys(x)


@pytest.mark.parametrize("dim", DIMS)
def test_stored_keys_become_the_models_again(dim: int) -> None:
    keys = normal(9, 1, 2, 40, dim) * 3 + 5
    maps = [KeyMap(), calibrated(2, dim)] + ([KeyMap("hadamard")] if dim & (dim - 1) == 0 else [])
    for key_map in maps:
        restored = key_map.restored(key_map.keys(keys))
        assert restored.dtype == mx.float32
        assert float(mx.abs(restored - keys).max()) < 1e-3  # of keys up to 20
