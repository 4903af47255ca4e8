"""Start-up self-test: each packed path of this device against plain float32 arithmetic, before it may serve."""

from __future__ import annotations

import logging

import mlx.core as mx
import numpy as np
from agentmem.quant.attention import PATHS, Attention, dequantised_history, rotate
from agentmem.quant.format import KVFormat, LayerShape
from agentmem.quant.rows import RowCodec

log = logging.getLogger(__name__)

RAW_ROWS, PACKED_ROWS, CHUNK = 5, 70, 3


def _numpy_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Causal attention in float64. q [H, n, D]; k, v [H, S, D] with the chunk's rows last."""
    scores = np.einsum("hnd,hsd->hns", q, k) * scale
    n, s = scores.shape[1:]
    visible = np.arange(s)[None, :] <= np.arange(n)[:, None] + (s - n)
    scores = np.where(visible[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hns,hsd->hnd", weights / weights.sum(-1, keepdims=True), v)


def code_error(codec: RowCodec, raw: mx.array) -> float:
    """Largest error of a packed element in quantisation steps; below 1.5, since MLX moves each scale so that 0 is exact."""
    if not codec.format.packs:
        return 0.0
    keys, values = codec.unraw(raw, mx.float32)
    packed = codec.unpack(codec.pack(raw), mx.float32)
    worst = 0.0
    for x, y, code in zip((keys, values), packed, (codec.format.keys, codec.format.values), strict=True):
        assert code is not None
        groups = np.array(x).reshape(-1, code.group)
        step = (groups.max(1) - groups.min(1)) / (2**code.bits - 1)
        error = np.abs(groups - np.array(y).reshape(-1, code.group)).max(1)
        worst = max(worst, float((error / np.maximum(step, 1e-6)).max()))
    return worst


def path_error(attend: Attention, codec: RowCodec, query_heads: int, dtype: mx.Dtype) -> float:
    """Largest deviation of one attention path from float64 arithmetic over the same dequantised rows."""
    shape, rotation = codec.shape, codec.format.rotation
    rng = mx.random.key(7)
    parts = mx.random.split(rng, 5)
    total = RAW_ROWS + PACKED_ROWS

    def normal(key: mx.array, *dims: int) -> mx.array:
        return mx.random.normal(dims, key=key).astype(dtype)

    q = rotate(normal(parts[0], 1, query_heads, CHUNK, shape.key_dim), rotation)
    new_k = rotate(normal(parts[1], 1, shape.heads, CHUNK, shape.key_dim), rotation)
    new_v = normal(parts[2], 1, shape.heads, CHUNK, shape.value_dim)
    old_k = rotate(normal(parts[3], shape.heads, total, shape.key_dim), rotation)
    rows = codec.raw(old_k, normal(parts[4], shape.heads, total, shape.value_dim))
    history = dequantised_history(codec, [rows[:RAW_ROWS]], codec.pack(rows[RAW_ROWS:]), dtype)
    scale = shape.key_dim**-0.5
    out = attend(q, new_k, new_v, history, scale=scale)
    repeat = query_heads // shape.heads

    def widen(old: list[mx.array], new: mx.array) -> np.ndarray:
        joined = np.concatenate([np.array(x.astype(mx.float32)) for x in [*old, new[0]]], axis=1)
        return np.repeat(joined, repeat, axis=0).astype(np.float64)

    want = _numpy_attention(
        np.array(q[0].astype(mx.float32)).astype(np.float64),
        widen(history[0], new_k),
        widen(history[1], new_v),
        scale,
    )
    return float(np.abs(np.array(out[0].astype(mx.float32)) - want).max())


def self_test(
    format: KVFormat, shape: LayerShape, query_heads: int, dtype: mx.Dtype, stored: mx.Dtype
) -> dict[str, object]:
    """Run every path; returns `{"code_error", "paths": {name: {"error", "ok"}}}`. A path that is off is not offered.

    Raises RuntimeError when no path is right, since then no answer of this device could be trusted.
    """
    codec = RowCodec(shape, format.for_shape(shape), stored)
    bound = 1e-4 if dtype == mx.float32 else 4e-2
    raw = codec.raw(
        mx.random.normal((shape.heads, PACKED_ROWS, shape.key_dim), key=mx.random.key(1)),
        mx.random.normal((shape.heads, PACKED_ROWS, shape.value_dim), key=mx.random.key(2)),
    )
    steps = code_error(codec, raw)
    if steps > 1.5:
        raise RuntimeError(
            f"packing is broken on this device: an element is {steps:.2f} quantisation steps off"
        )
    paths: dict[str, dict[str, object]] = {}
    for name, attend in PATHS.items():
        error = path_error(attend, codec, query_heads, dtype)
        paths[name] = {"error": error, "ok": error <= bound}
        if error > bound:
            log.warning("attention path %s refused: off by %.2g (bound %.2g)", name, error, bound)
    if not any(p["ok"] for p in paths.values()):
        raise RuntimeError("no attention path passes the self-test on this device; see the log")
    return {"code_error": steps, "paths": paths}
