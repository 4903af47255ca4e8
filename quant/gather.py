"""The gathered path: one kernel per layer turns stored rows and the new chunk into whole keys and values.

It unpacks packed rows, widens raw ones, appends the chunk, and gives the chunk's rows as they will be stored; fused SDPA
follows. A dozen small MLX operations per layer become one, which is what time to first token is made of on a GPU. The
start-up self-test admits it per device.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from agentmem.quant.attention import StoredRows, whole_attention
from agentmem.quant.device import backend, on_device
from agentmem.quant.kernels.decode import KEY_BITS
from agentmem.quant.kernels.source import kernel
from agentmem.quant.rows import RowCodec

ELEMENTS = 8
"""Elements of a key or a value that one thread handles."""

INPUTS = ("arena", "offsets", "tail", "keys", "values", "sizes")
OUTPUTS = ("all_keys", "all_values", "rows")

THREADS = 256

_BODY = """
  gather_rows<H, DK, DV, KB, KG, VB, VG, BF, T>(arena, offsets, tail, keys, values, sizes[0], sizes[1], sizes[2], sizes[3],
                                                all_keys, all_values, rows, group * threads + tid);
"""


def supported(codec: RowCodec) -> bool:
    """Whether this device and this layer's format can take the path: a GPU, and codes that the kernel reads."""
    format, shape = codec.format, codec.shape
    if backend() == "cpu" or format.keys is None or format.values is None:
        return False
    bits = {format.keys.bits, format.values.bits}
    return bits <= set(KEY_BITS) and shape.key_dim % ELEMENTS == 0 and shape.value_dim % ELEMENTS == 0


@lru_cache(maxsize=16)
def _sizes(*sizes: int) -> mx.array:
    made = on_device(np.array(sizes, np.uint32))
    mx.async_eval(made)  # it outlives the thread that asks for it first
    return made


def gather(
    codec: RowCodec, stored: StoredRows, keys: mx.array, values: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Whole keys [1, heads, S, key_dim] and values [1, heads, S, value_dim], and the chunk's raw rows uint32 [n, raw_words].

    keys, values [1, heads, n, dim] of the chunk, in model precision. Precondition: `supported(codec)`.
    """
    shape, format = codec.shape, codec.format
    assert format.keys is not None
    assert format.values is not None
    fresh, tailed = keys.shape[2], stored.tail.shape[0]
    total = stored.packed + stored.raw + tailed + fresh
    nothing = mx.zeros((1,), mx.uint32)
    units = (shape.key_dim + shape.value_dim) // ELEMENTS
    kernel_ = kernel("agentmem_gather_rows", ("gather.h",), _BODY, INPUTS, OUTPUTS)
    whole_keys, whole_values, rows = kernel_(
        inputs=[
            stored.arena,
            stored.offsets if stored.offsets is not None else nothing,
            stored.tail if tailed else nothing,
            keys, values,
            _sizes(stored.packed, stored.raw, tailed, fresh),
        ],
        template=[
            ("T", keys.dtype), ("H", shape.heads), ("DK", shape.key_dim), ("DV", shape.value_dim),
            ("KB", format.keys.bits), ("KG", format.keys.group), ("VB", format.values.bits), ("VG", format.values.group),
            ("BF", codec.stored == mx.bfloat16),
        ],
        grid=(-(-units * total * shape.heads // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[
            (1, shape.heads, total, shape.key_dim),
            (1, shape.heads, total, shape.value_dim),
            (fresh, codec.raw_words),
        ],
        output_dtypes=[keys.dtype, values.dtype, mx.uint32],
    )  # fmt: skip
    return whole_keys, whole_values, rows


def gathered_path(
    codec: RowCodec, stored: StoredRows, queries: mx.array, keys: mx.array, values: mx.array, *,
    scale: float, sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Attention through `gather`; see `agentmem.quant.attention.Path`."""
    whole_keys, whole_values, rows = gather(codec, stored, keys, values)
    return whole_attention(queries, whole_keys, whole_values, scale=scale, sinks=sinks), rows
