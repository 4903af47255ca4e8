"""Start-up self-test: each packed path of this device against plain float32 arithmetic, before it may serve."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.quant.attention import Path, dequantised_history
from agentmem.quant.device import backend
from agentmem.quant.format import KVFormat, LayerShape
from agentmem.quant.kernels.check import fused_test
from agentmem.quant.paths import candidates
from agentmem.quant.rows import RowCodec

log = logging.getLogger(__name__)

RAW_ROWS, PACKED_ROWS, TAIL_ROWS = 5, 70, 4
CHUNKS = (1, 3, 40, 70)


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


@dataclass(slots=True)
class _Stored:
    """Rows as `StoredRows`, the raw block in the middle of the arena, so that offsets matter."""

    codec: RowCodec
    rows: mx.array
    tail: mx.array
    raw: int = RAW_ROWS
    packed: int = PACKED_ROWS

    def __post_init__(self) -> None:
        words = self.codec.packed_words
        flat = self.rows[: self.raw].reshape(-1)
        room = -(-flat.size // words)
        image = mx.pad(flat, (0, room * words - flat.size)).reshape(room, words)
        packed = self.codec.pack(self.rows[self.raw :])
        self.arena = mx.concatenate([packed[:7], image, packed[7:]])
        at = [i + (room if i >= 7 else 0) for i in range(self.packed)]
        raw_at = [7 * words + i * self.codec.raw_words for i in range(self.raw)]
        self.offsets = mx.array([i * words for i in at] + raw_at, dtype=mx.uint32)
        mx.eval(self.arena)

    arena: mx.array = field(init=False)
    offsets: mx.array | None = field(init=False)

    def packed_rows(self) -> mx.array | None:
        return self.codec.pack(self.rows[self.raw :])

    def raw_blocks(self) -> list[mx.array]:
        return [self.rows[: self.raw], self.tail]


def path_error(path: Path, codec: RowCodec, query_heads: int, dtype: mx.Dtype, chunk: int) -> float:
    """Largest deviation of one path from float64 arithmetic over the same stored rows; infinite when it stores other rows."""
    shape = codec.shape
    parts = mx.random.split(mx.random.key(7), 5)
    total = RAW_ROWS + PACKED_ROWS + TAIL_ROWS

    def normal(key: mx.array, *dims: int) -> mx.array:
        return mx.random.normal(dims, key=key).astype(dtype)

    q = normal(parts[0], 1, query_heads, chunk, shape.key_dim)
    new_k = normal(parts[1], 1, shape.heads, chunk, shape.key_dim)
    new_v = normal(parts[2], 1, shape.heads, chunk, shape.value_dim)
    old_k = normal(parts[3], shape.heads, total, shape.key_dim)
    rows = codec.raw(old_k, normal(parts[4], shape.heads, total, shape.value_dim))
    stored = _Stored(codec, rows[:-TAIL_ROWS], rows[-TAIL_ROWS:])
    out, new_rows = path(codec, stored, q, new_k, new_v, scale=shape.key_dim**-0.5)
    if not mx.array_equal(new_rows, codec.raw(new_k[0], new_v[0])).item():
        return float("inf")
    history = dequantised_history(codec, stored.raw_blocks(), stored.packed_rows(), mx.float32)
    repeat = query_heads // shape.heads

    def widen(old: list[mx.array], new: mx.array) -> np.ndarray:
        joined = np.concatenate([np.array(x.astype(mx.float32)) for x in [*old, new[0]]], axis=1)
        return np.repeat(joined, repeat, axis=0).astype(np.float64)

    want = _numpy_attention(
        np.array(q[0].astype(mx.float32)).astype(np.float64), widen(history[0], new_k), widen(history[1], new_v),
        shape.key_dim**-0.5,
    )  # fmt: skip
    return float(np.abs(np.array(out[0].astype(mx.float32)) - want).max())


def _error_or_inf(name: str, path: Path, codec: RowCodec, query_heads: int, dtype: mx.Dtype) -> float:
    """A path that does not even run is as good as wrong: the next one serves."""
    try:
        return max(path_error(path, codec, query_heads, dtype, chunk) for chunk in CHUNKS)
    except (RuntimeError, ValueError) as error:
        log.warning("attention path %s does not run here: %s", name, error)
        return float("inf")


def _bound(dtype: mx.Dtype) -> float:
    """Largest deviation that rounding explains: CUDA multiplies float32 as TF32, which has float16's mantissa."""
    if dtype != mx.float32:
        return 4e-2
    return 4e-3 if backend() == "cuda" else 1e-4


def self_test(
    format: KVFormat, shape: LayerShape, query_heads: int, dtype: mx.Dtype, stored: mx.Dtype
) -> dict[str, Any]:
    """Run every path; returns `{"code_error", "paths": {name: {"error", "ok"}}}`. A path that is off is not offered.

    Raises RuntimeError when no path is right, since then no answer of this device could be trusted.
    """
    codec = RowCodec(shape, format.for_shape(shape), stored)
    bound = _bound(dtype)
    raw = codec.raw(
        mx.random.normal((shape.heads, PACKED_ROWS, shape.key_dim), key=mx.random.key(1)),
        mx.random.normal((shape.heads, PACKED_ROWS, shape.value_dim), key=mx.random.key(2)),
    )
    steps = code_error(codec, raw)
    if steps > 1.5:
        raise RuntimeError(
            f"packing is broken on this device: an element is {steps:.2f} quantisation steps off"
        )
    paths: dict[str, dict[str, Any]] = {}
    for name, path in candidates(codec).items():
        error = _error_or_inf(name, path, codec, query_heads, dtype)
        paths[name] = {"error": error, "ok": error <= bound}
        if error > bound:
            log.warning("attention path %s refused: off by %.2g (bound %.2g)", name, error, bound)
    if not any(p["ok"] for p in paths.values()):
        raise RuntimeError("no attention path passes the self-test on this device; see the log")
    return {"code_error": steps, "paths": paths}


def self_tests(codecs: Sequence[RowCodec], query_heads: int, dtype: mx.Dtype) -> dict[str, Any]:
    """`self_test` for layers of several codecs: the worst of each figure; a path must be right for all of them.

    Raises RuntimeError as that does, also when no path serves all.
    """
    results = [self_test(c.format, c.shape, query_heads, dtype, c.stored) for c in codecs]
    names = [name for name in results[0]["paths"] if all(name in r["paths"] for r in results)]
    paths = {name: _worst([r["paths"][name] for r in results]) for name in names}
    if not any(p["ok"] for p in paths.values()):
        raise RuntimeError("no attention path passes the self-test for all layers; see the log")
    fused = [fused_test(c, query_heads, dtype, _bound(dtype)) for c in dict.fromkeys(codecs)]
    return {
        "code_error": max(r["code_error"] for r in results),
        "paths": paths,
        "fused": next((f for f in fused if not f["ok"]), max(fused, key=lambda f: f.get("error", 0.0))),
    }


def _worst(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"error": max(o["error"] for o in outcomes), "ok": all(o["ok"] for o in outcomes)}
