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
from agentmem.quant.paths import LONGEST, candidates
from agentmem.quant.rows import RowCodec

log = logging.getLogger(__name__)

RAW_ROWS, PACKED_ROWS, TAIL_ROWS = 5, 70, 4
CHUNKS = (1, 3, 40, 70)


def _numpy_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Causal attention in float64. q [heads, queries a head, n, D]; k, v [heads, S, D] with the chunk's rows last."""
    scores = q @ k[:, None].swapaxes(-1, -2) * scale
    n, s = scores.shape[-2:]
    visible = np.arange(s)[None, :] <= np.arange(n)[:, None] + (s - n)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v[:, None]


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
        self._image = self.codec.pack(self.rows[self.raw :])
        self.arena = mx.concatenate([self._image[:7], image, self._image[7:]])
        at = [i + (room if i >= 7 else 0) for i in range(self.packed)]
        raw_at = [7 * words + i * self.codec.raw_words for i in range(self.raw)]
        self.offsets = mx.array([i * words for i in at] + raw_at, dtype=mx.uint32)
        mx.eval(self.arena, self._image)

    arena: mx.array = field(init=False)
    offsets: mx.array | None = field(init=False)
    _image: mx.array = field(init=False)

    def packed_rows(self) -> mx.array | None:
        return self._image

    def raw_blocks(self) -> list[mx.array]:
        return [self.rows[: self.raw], self.tail]


@dataclass(frozen=True, slots=True)
class _Trial:
    """Stored rows, the longest chunk, and what must come of it. A shorter chunk is its beginning, in all of these."""

    codec: RowCodec
    stored: _Stored
    queries: mx.array
    keys: mx.array
    values: mx.array
    rows: mx.array
    want: np.ndarray

    def run(self, path: Path, chunk: int) -> tuple[mx.array, mx.array]:
        """The first `chunk` tokens through `path`, unevaluated: output [H, chunk, D], and whether it stores their rows."""
        q, k, v = (x[:, :, :chunk] for x in (self.queries, self.keys, self.values))
        out, rows = path(self.codec, self.stored, q, k, v, scale=self.codec.shape.key_dim**-0.5)
        return out[0].astype(mx.float32), mx.array_equal(rows, self.rows[:chunk])

    def error(self, out: mx.array, same_rows: mx.array) -> float:
        """Largest deviation of an output of `run`; infinite when other rows would be stored."""
        want = self.want[:, : out.shape[1]]
        return float(np.abs(np.array(out) - want).max()) if same_rows.item() else float("inf")


def _trial(codec: RowCodec, query_heads: int, dtype: mx.Dtype) -> _Trial:
    """Normal values, and float64 arithmetic over the rows as they are stored."""
    shape, chunk = codec.shape, max(CHUNKS)
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
    history = dequantised_history(codec, stored.raw_blocks(), stored.packed_rows(), mx.float32)
    k, v = (
        mx.concatenate([*old, new[0].astype(mx.float32)], axis=1)
        for old, new in zip(history, (new_k, new_v), strict=True)
    )
    plain_q, new_rows = q[0].astype(mx.float32), codec.raw(new_k[0], new_v[0])
    mx.eval(plain_q, k, v, new_rows)
    wide_q, wide_k, wide_v = (np.array(x).astype(np.float64) for x in (plain_q, k, v))
    grouped = wide_q.reshape(shape.heads, -1, chunk, shape.key_dim)
    want = _numpy_attention(grouped, wide_k, wide_v, shape.key_dim**-0.5).reshape(query_heads, chunk, -1)
    return _Trial(codec, stored, q, new_k, new_v, new_rows, want)


def _errors(name: str, path: Path, trial: _Trial) -> dict[int, float]:
    """{chunk: error} of the chunks that the path serves itself. One that does not even run is as good as wrong."""
    chunks = [n for n in CHUNKS if n <= LONGEST.get(name, n)]
    try:
        runs = [trial.run(path, n) for n in chunks]
        mx.eval(runs)
        return {n: trial.error(*run) for n, run in zip(chunks, runs, strict=True)}
    except (RuntimeError, ValueError) as error:
        log.warning("attention path %s does not run here: %s", name, error)
        return dict.fromkeys(chunks, float("inf"))


def _path_errors(trial: _Trial) -> dict[str, float]:
    """{path: largest error}. Chunks that a path hands to the reference path are as right as that is."""
    errors = {name: _errors(name, path, trial) for name, path in candidates(trial.codec).items()}
    reference = errors.get("reference", dict.fromkeys(CHUNKS, float("inf")))
    return {name: max((reference | own).values()) for name, own in errors.items()}


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
    for name, error in _path_errors(_trial(codec, query_heads, dtype)).items():
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
