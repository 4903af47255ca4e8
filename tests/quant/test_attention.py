"""The reference attention path against plain float64 arithmetic; rotation leaves scores alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from agentmem.quant.attention import dequantised_history, reference_attention, rotate, short_attention
from agentmem.quant.format import LayerShape, kv_format
from agentmem.quant.rows import RowCodec


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def largest(x: mx.array) -> float:
    """Largest magnitude."""
    return float(np.abs(f64(x)).max())


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Causal attention, written as loops: q [H, n, D]; k, v [H_kv, S, D], the chunk's rows last."""
    heads, n, _ = q.shape
    group, total = heads // k.shape[0], k.shape[1]
    out = np.zeros((heads, n, v.shape[2]))
    for h in range(heads):
        for i in range(n):
            seen = total - n + i + 1
            scores = k[h // group, :seen] @ q[h, i] * scale
            weights = np.exp(scores - scores.max())
            out[h, i] = weights @ v[h // group, :seen] / weights.sum()
    return out


def f64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("name", ["q4-plain", "q4-rotated", "k8v4-plain", "q8-plain", "fp16"])
@pytest.mark.parametrize(
    ("raw", "packed", "chunk"),
    [(0, 0, 1), (0, 0, 5), (3, 0, 1), (0, 64, 1), (64, 64, 1), (64, 130, 7), (1, 1, 1), (64, 17, 64)],
)
def test_reference_attention_is_plain_attention_over_raw_packed_and_chunk(
    name: str, raw: int, packed: int, chunk: int
) -> None:
    shape = LayerShape(2, 64, 32)
    codec = RowCodec(shape, kv_format(name).for_shape(shape), mx.float16)
    rotation = codec.format.rotation
    q, k, v = normal(1, 1, 6, chunk, 64), normal(2, 1, 2, chunk, 64), normal(3, 1, 2, chunk, 32)
    # One row more than is used: MLX refuses to reshape an empty array.
    rows = codec.raw(rotate(normal(4, 2, raw + packed + 1, 64), rotation), normal(5, 2, raw + packed + 1, 32))
    rows = rows[: raw + packed]
    history = dequantised_history(codec, [rows[:raw]], codec.pack(rows[raw:]) if packed else None, mx.float32)
    out = reference_attention(rotate(q, rotation), rotate(k, rotation), v, history, scale=0.125)

    # What is stored is attended to, with the rotation undone (it is its own inverse).
    stored = [codec.unraw(rows[:raw], mx.float32)] if raw else []
    if packed:
        stored.append(codec.unpack(codec.pack(rows[raw:]), mx.float32))
    all_keys = np.concatenate([*(f64(rotate(keys, rotation)) for keys, _ in stored), f64(k[0])], axis=1)
    all_values = np.concatenate([*(f64(values) for _, values in stored), f64(v[0])], axis=1)
    want = plain_attention(f64(q[0]), all_keys, all_values, 0.125)
    assert out.shape == (1, 6, chunk, 32)
    assert np.abs(f64(out[0]) - want).max() < 2e-5


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 99, 100])
def test_where_history_turns_from_raw_to_packed_only_changes_rounding(cut: int) -> None:
    """q8 is fine enough that any split of 100 rows gives nearly the same answer; a lost row does not."""
    shape = LayerShape(2, 64, 64)
    codec = RowCodec(shape, kv_format("q8-plain"), mx.float16)
    q, k, v = normal(1, 1, 4, 3, 64), normal(2, 1, 2, 3, 64), normal(3, 1, 2, 3, 64)
    rows = codec.raw(normal(4, 2, 100, 64), normal(5, 2, 100, 64))

    def attend(raw: int) -> mx.array:
        packed = codec.pack(rows[raw:]) if raw < 100 else None
        history = dequantised_history(codec, [rows[:raw]], packed, mx.float32)
        return reference_attention(q, k, v, history, scale=0.125)

    whole = attend(100)
    assert largest(attend(cut) - whole) < 0.02
    history = dequantised_history(codec, [rows[1:]], None, mx.float32)
    assert largest(reference_attention(q, k, v, history, scale=0.125) - whole) > 0.02


def test_several_raw_blocks_are_one_history() -> None:
    shape = LayerShape(2, 64, 64)
    codec = RowCodec(shape, kv_format("fp16"), mx.float16)
    rows = codec.raw(normal(4, 2, 30, 64), normal(5, 2, 30, 64))
    blocks = dequantised_history(codec, [rows[:10], rows[10:10], rows[10:]], None, mx.float32)
    assert [b.shape[1] for b in blocks[0]] == [10, 20]
    q, k, v = normal(1, 1, 4, 2, 64), normal(2, 1, 2, 2, 64), normal(3, 1, 2, 2, 64)
    one = dequantised_history(codec, [rows], None, mx.float32)
    a, b = (reference_attention(q, k, v, h, scale=0.125) for h in (blocks, one))
    assert mx.array_equal(a, b).item()


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_rotation_leaves_scores_and_lengths_alone(dim: int) -> None:
    q, k = normal(1, 2, 5, dim), normal(2, 2, 9, dim)
    turned_q, turned_k = rotate(q, "hadamard"), rotate(k, "hadamard")
    assert largest(turned_k - k) > 0.5
    plain, turned = q @ k.swapaxes(1, 2), turned_q @ turned_k.swapaxes(1, 2)
    assert largest(plain - turned) < 1e-4
    assert mx.allclose(mx.linalg.norm(turned_k, axis=-1), mx.linalg.norm(k, axis=-1), atol=1e-4).item()


def test_rotation_none_is_the_identity_and_others_are_refused() -> None:
    x = normal(1, 3, 64)
    assert rotate(x, "none") is x
    with pytest.raises(ValueError, match="unknown rotation 'spiral'"):
        rotate(x, "spiral")


@pytest.mark.parametrize(("batch", "n", "total"), [(1, 2, 2), (1, 40, 90), (1, 130, 300), (3, 20, 50)])
def test_short_attention_is_fused_attention(batch: int, n: int, total: int) -> None:
    queries, keys = normal(1, batch, 6, n, 32), normal(2, batch, 2, total, 32)
    values = normal(3, batch, 2, total, 24)
    want = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask="causal")
    assert largest(short_attention(queries, keys, values, scale=0.3) - want) < 1e-5
