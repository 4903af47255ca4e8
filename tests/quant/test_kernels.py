"""The fused path's kernels against plain arithmetic over the same stored rows: on a GPU as they are, on a CPU lane by lane."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agentmem.quant.device import backend
from agentmem.quant.format import Code, KVFormat, LayerShape
from agentmem.quant.kernels import check, decode
from agentmem.quant.kernels.decode import GROUP, flash_decode
from agentmem.quant.kernels.plan import HEADER, ITEM
from agentmem.quant.rows import RowCodec
from tests.quant.emulated import device
from tests.quant.stored_batch import StoredBatch
from tests.quant.test_keymap import calibrated

pytestmark = pytest.mark.skipif(
    backend() == "cpu" and device.COMPILER is None, reason="neither a GPU nor a C++ compiler"
)

BOUND = 2e-3


def codec(
    heads: int, dim: int, keys: int, values: int, group: int, stored: mx.Dtype = mx.float16
) -> RowCodec:
    shape = LayerShape(heads, dim, dim)
    if not keys:
        return RowCodec(shape, KVFormat("raw", None, None), stored)
    return RowCodec(shape, KVFormat("test", Code(keys, group), Code(values, group)), stored)


def error(stored: StoredBatch, **options: object) -> float:
    sinks: Any = options.get("sinks")
    attend = device.attend if backend() == "cpu" else flash_decode
    out, rows = attend(
        stored.codec, stored.queries, stored.keys, stored.values, stored.arena, (stored.tails, 0), stored.batch,
        scale=stored.scale, sinks=mx.array(sinks) if sinks is not None else None,
    )  # fmt: skip
    assert np.array_equal(np.array(rows), np.stack(stored.rows))
    return float(np.abs(np.array(out) - stored.expected(**options)).max())  # type: ignore[arg-type]


SHAPES = {
    "4 bits, 64": (2, 8, 128, 4, 4, 64),
    "4 bits, 32": (2, 4, 64, 4, 4, 32),
    "3 bits, 96": (1, 3, 96, 3, 3, 32),
    "3 bits, 64": (1, 2, 64, 3, 3, 64),
    "8 and 4 bits": (3, 9, 64, 8, 4, 64),
    "5 and 4 bits": (3, 9, 64, 5, 4, 64),
    "5 and 4 bits, 96": (1, 3, 96, 5, 4, 32),
    "5 and 3 bits": (1, 2, 64, 5, 3, 64),
    "6 and 4 bits": (2, 4, 128, 6, 4, 64),
    "4 and 8 bits, 32": (1, 4, 64, 4, 8, 32),
    "256": (1, 4, 256, 4, 4, 64),
    "many heads": (1, 12, 64, 4, 4, 64),
    "16 bits": (2, 4, 64, 0, 0, 0),
}
MAPPED = (
    "4 bits, 64",
    "4 bits, 32",
    "3 bits, 64",
    "8 and 4 bits",
    "5 and 4 bits",
    "6 and 4 bits",
    "4 and 8 bits, 32",
    "256",
    "many heads",
    "16 bits",
)


def test_codes_that_the_kernel_does_not_know_are_left_to_the_other_paths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "backend", lambda: "cuda")
    assert all(decode.supported(codec(2, 64, keys, 4, 64), 4) for keys in (3, 4, 5, 6, 8))
    assert not decode.supported(codec(2, 64, 4, 5, 64), 4)
    assert not decode.supported(codec(2, 64, 2, 4, 64), 4)
    refused = check.fused_test(codec(2, 64, 4, 6, 64), 4, mx.float16, BOUND)
    assert refused == {"ok": False, "reason": "no kernel for this device, shape or format"}


def test_two_sequences() -> None:
    assert error(StoredBatch(codec(1, 64, 4, 4, 64), 2, [3, 81])) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_ragged_batch(shape: tuple[int, ...]) -> None:
    heads, query_heads, *rest = shape
    lengths = [1, 63, 64, 65, 128, 129, 200]
    assert error(StoredBatch(codec(heads, *rest), query_heads, lengths)) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 4])
def test_bfloat16(bits: int) -> None:
    assert error(StoredBatch(codec(2, 64, bits, bits, 64, mx.bfloat16), 4, [5, 150])) < BOUND


@pytest.mark.slow
def test_pages_that_were_cut() -> None:
    assert error(StoredBatch(codec(1, 64, 4, 4, 64), 2, [30, 100, 219], cut=True)) < BOUND


@pytest.mark.parametrize(
    ("query_heads", "count", "wide"), [(2, 3, False), (4, 3, True), (4, 6, True), (12, 2, True)]
)
@pytest.mark.slow
def test_a_shared_prefix_is_read_once(query_heads: int, count: int, wide: bool) -> None:
    stored = StoredBatch(codec(1, 64, 4, 4, 64), query_heads, [200 + 7 * i for i in range(count)], shared=3)
    layout = stored.batch.layout(stored.codec, GROUP)
    items = np.array(layout.plan)[HEADER:][: layout.bundles * GROUP * ITEM].reshape(-1, ITEM)
    assert ((items[:, 3] - items[:, 2]).max() > 1) == (query_heads * 2 <= 16)
    assert stored.batch.wide == wide
    assert error(stored) < BOUND


@pytest.mark.slow
def test_a_window() -> None:
    stored = StoredBatch(codec(1, 64, 4, 4, 64), 4, [200, 70, 10])
    lows = [137, 66, 0]
    stored.batch.advance(stored.tail_rows, lows)
    assert error(stored, lows=lows) < BOUND


@pytest.mark.slow
def test_sinks() -> None:
    sinks = np.array([0.5, 3.0, -2.0, 6.0])
    assert error(StoredBatch(codec(2, 64, 4, 4, 64), 4, [100, 3]), sinks=sinks) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPES[name] for name in MAPPED], ids=MAPPED)
def test_keys_and_queries_of_the_model_are_mapped(shape: tuple[int, ...]) -> None:
    """What the model gives becomes what the batch has stored and asks for, but for the rounding of the way there and back."""
    heads, query_heads, *rest = shape
    stored = StoredBatch(codec(heads, *rest), query_heads, [1, 64, 150, 200])
    dim = stored.codec.shape.key_dim
    key_map = calibrated(heads, dim)
    assert key_map.vectors is not None
    grouped = stored.queries.reshape(len(stored.lengths), heads, -1, dim)
    queries = np.linalg.solve(np.array(key_map._back).swapaxes(1, 2), np.array(grouped).swapaxes(2, 3))
    shift = np.array(
        key_map._shift, np.float64
    )  # a GPU's own product of these would keep ten bits of each factor
    model_keys = (np.array(stored.keys, np.float64) - shift) @ np.array(key_map._back, np.float64).swapaxes(
        1, 2
    )
    attend = device.attend if backend() == "cpu" else flash_decode
    out, rows = attend(
        stored.codec, mx.array(queries.swapaxes(2, 3).astype(np.float32)).reshape(stored.queries.shape),
        mx.array(model_keys.astype(np.float32)), stored.values, stored.arena, (stored.tails, 0), stored.batch, scale=stored.scale,
        vectors=key_map.vectors,
    )  # fmt: skip
    got, want = (stored.codec.unraw(mx.array(np.array(r)), mx.float32) for r in (rows, np.stack(stored.rows)))
    assert np.allclose(np.array(got[0]), np.array(want[0]), rtol=2e-3, atol=1e-2)
    assert np.array_equal(np.array(got[1]), np.array(want[1]))
    assert float(np.abs(np.array(out) - stored.expected()).max()) < 2 * BOUND
