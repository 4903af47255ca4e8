"""The fused path's self-test: a small ragged batch against the dequantised reference, before the path may serve."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.quant.attention import dequantised_history
from agentmem.quant.kernels.decode import flash_decode, supported
from agentmem.quant.kernels.plan import Batch, Reach
from agentmem.quant.keymap import CalibratedMap, KeyMap
from agentmem.quant.rows import RowCodec

log = logging.getLogger(__name__)

PAGE = 32
CUT = 21
PLAIN = KeyMap()
ROUNDING = 2.0**-7
"""Of a bfloat16, twice: keys are rounded behind a map, and the map itself may round."""


def fused_error(codec: RowCodec, query_heads: int, dtype: mx.Dtype, key_map: KeyMap = PLAIN) -> float:
    """Largest deviation from fused SDPA over dequantised rows; infinite when the tokens' rows are stored otherwise.

    Two sequences with a common page: raw first page in slots of its own, a packed page, one cut short, and tails. The kernel
    gets queries and the tokens' own keys in front of `key_map`.
    """
    shape, parts = codec.shape, mx.random.split(mx.random.key(11), 6)

    def rows(n: int, key: mx.array) -> mx.array:
        each = mx.random.split(key)
        keys = mx.random.normal((shape.heads, n, shape.key_dim), key=each[0])
        return codec.raw(keys, mx.random.normal((shape.heads, n, shape.value_dim), key=each[1]))

    room = PAGE * codec.packed_words
    per = room // codec.raw_words
    first = rows(PAGE, parts[0])
    images = [first[i : i + per].reshape(-1) for i in range(0, PAGE, per)]
    arena = [mx.pad(image, (0, room - image.size)) for image in images]
    packed = [codec.pack(rows(PAGE, part)) for part in parts[1:3]]
    arena += [p.reshape(-1) for p in packed]
    tails = mx.stack([mx.pad(rows(n, parts[3 + i]), [(0, PAGE - n), (0, 0)]) for i, n in enumerate((1, 18))])
    raw = [min(per, PAGE - i) for i in range(0, PAGE, per)]
    at, kinds = np.arange(len(arena)), np.arange(len(arena)) < len(raw)
    if not codec.format.packs:
        kinds[:] = True
    reaches = [
        Reach(at[:-1], np.array([*raw, PAGE]), kinds[:-1], 0),
        Reach(at, np.array([*raw, PAGE, CUT]), kinds, 1),
    ]
    batch = Batch(reaches, PAGE, shape.heads, query_heads // shape.heads)
    batch.advance([1, 18])
    queries = mx.random.normal((2, query_heads, 1, shape.key_dim), key=parts[5]).astype(dtype)
    fresh = [codec.unraw(tails[i, n - 1 : n], dtype) for i, n in enumerate((1, 18))]
    keys, values = (mx.stack([f[k] for f in fresh]) for k in (0, 1))
    keys = key_map.restored(keys).astype(dtype)
    scale = shape.key_dim**-0.5
    out, new = flash_decode(
        codec, queries, keys, values, mx.concatenate(arena).reshape(-1, codec.packed_words), (tails, 0), batch,
        scale=scale, vectors=key_map.vectors,
    )  # fmt: skip
    off = 0.0 if key_map.vectors is None else ROUNDING
    if not _same(codec, new, key_map.keys(keys)[:, :, 0], values[:, :, 0], off):
        return float("inf")
    queries = key_map.queries(queries.astype(mx.float32))
    worst = 0.0
    for i, n in enumerate((1, 18)):
        history = mx.concatenate([packed[0], packed[1][:CUT]]) if i else packed[0]
        old = dequantised_history(codec, [first, tails[i, : n - 1], new[i : i + 1]], history, mx.float32)
        k, v = (mx.concatenate(x, axis=1)[None] for x in old)
        want = mx.fast.scaled_dot_product_attention(queries[i : i + 1], k, v, scale=scale)
        worst = max(worst, float(np.abs(np.array(out[i].astype(mx.float32)) - np.array(want[0])).max()))
    return worst


def _same(codec: RowCodec, rows: mx.array, keys: mx.array, values: mx.array, off: float) -> bool:
    """Whether rows hold these values [n, heads, dim], and keys that are off by `off` of the largest at most."""
    held = codec.unraw(rows, mx.float32)
    far = mx.abs(held[0] - keys.swapaxes(0, 1).astype(mx.float32)).max() / mx.abs(held[0]).max()
    same = mx.array_equal(held[1], values.swapaxes(0, 1).astype(mx.float32))
    return bool(same.item()) and float(np.array(far)) <= off


def _trial_map(codec: RowCodec, dtype: mx.Dtype) -> KeyMap:
    """A key map as the format has it, with means and scales of many sizes."""
    shape = codec.shape
    if not codec.format.calibrated:
        return PLAIN
    rng = np.random.default_rng(5)
    mean = np.round(rng.normal(0, 2, (shape.heads, shape.key_dim))).astype(np.float32)
    return CalibratedMap(mean, np.exp2(rng.integers(-2, 3, mean.shape)).astype(np.float32), dtype)


def fused_test(codec: RowCodec, query_heads: int, dtype: mx.Dtype, bound: float) -> dict[str, Any]:
    """{"ok", "error" or "reason"}: whether decode steps may take the fused path for layers of this codec."""
    if not supported(codec, query_heads):
        return {"ok": False, "reason": "no kernel for this device, shape or format"}
    try:
        error = fused_error(codec, query_heads, dtype)
        key_map = _trial_map(codec, dtype)
        if key_map.vectors is not None:
            error = max(error, fused_error(codec, query_heads, dtype, key_map))
    except (RuntimeError, ValueError) as problem:
        log.warning("the fused path does not run here: %s", problem)
        return {"ok": False, "reason": str(problem).splitlines()[0][:200]}
    if error > bound:
        log.warning("the fused path is refused: off by %.2g (bound %.2g)", error, bound)
    return {"ok": error <= bound, "error": error}
