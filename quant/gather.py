"""The gathered path: one kernel per layer turns stored rows and the new chunk into whole keys and values.

It unpacks packed rows, widens raw ones, appends the chunk, and gives the chunk's rows as they will be stored; fused SDPA
follows. A dozen small MLX operations per layer become one, which is what time to first token is made of on a GPU. One body,
two headers (CUDA, Metal); the start-up self-test admits it per device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from agentmem.quant.attention import StoredRows, whole_attention
from agentmem.quant.device import backend
from agentmem.quant.rows import RowCodec

ELEMENTS = 8
"""Elements of a key or a value that one thread handles."""

INPUTS = ["arena", "offsets", "tail", "keys", "values", "sizes"]
OUTPUTS = ["all_keys", "all_values", "rows"]

_CUDA = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
__device__ inline float from_half(unsigned short x) { return __half2float(__ushort_as_half(x)); }
__device__ inline unsigned short to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
#define AS_FLOAT(x) __uint_as_float(x)
#define AS_UINT(x) __float_as_uint(x)
#define THREAD (unsigned int)cooperative_groups::this_grid().thread_rank()
#define FN __device__ inline
#define GLOBAL
"""

_METAL = """
inline float from_half(ushort x) { return float(as_type<half>(x)); }
inline ushort to_half(float x) { return as_type<ushort>(half(x)); }
#define AS_FLOAT(x) as_type<float>(x)
#define AS_UINT(x) as_type<uint>(x)
#define THREAD thread_position_in_grid.x
#define FN inline
#define GLOBAL device
"""

_COMMON = """
template <bool BF> FN float widen(unsigned int x) {
  return BF ? AS_FLOAT((x & 0xffffu) << 16) : from_half((unsigned short)(x & 0xffffu));
}
template <bool BF> FN unsigned int narrow(float x) {
  if (!BF) return to_half(x);
  unsigned int u = AS_UINT(x);
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
"""

_BODY = """
  const unsigned int UNITS = (DK + DV) / 8;
  const unsigned int packed = sizes[0], raw = sizes[1], tailed = sizes[2], fresh = sizes[3];
  const unsigned int total = packed + raw + tailed + fresh;
  unsigned int e = THREAD;
  if (e >= UNITS * total * H) return;
  const unsigned int unit = e % UNITS, s = (e / UNITS) % total, h = e / (UNITS * total);
  const bool is_key = unit < DK / 8;
  const unsigned int u = is_key ? unit : unit - DK / 8;
  const unsigned int dim = is_key ? DK : DV;
  const unsigned int raw_word = is_key ? (h * DK + u * 8) / 2 : (H * DK + h * DV + u * 8) / 2;
  float x[8];
  if (s < packed) {
    const unsigned int bits = is_key ? KB : VB, group = is_key ? KG : VG;
    const unsigned int key_words = H * DK * KB / 32 + H * DK / KG;
    const unsigned int base = offsets[s] + (is_key ? 0 : key_words);
    const unsigned int code = base + (h * dim + u * 8) * bits / 32;
    const unsigned int pair = arena[base + H * dim * bits / 32 + (h * dim + u * 8) / group];
    const float scale = widen<BF>(pair), bias = widen<BF>(pair >> 16);
    const unsigned int per = 32 / bits, mask = (1u << bits) - 1u;
    for (unsigned int i = 0; i < 8; i++) {
      const unsigned int q = (arena[code + i / per] >> (bits * (i % per))) & mask;
      x[i] = scale * (float)q + bias;
    }
  } else if (s < packed + raw + tailed) {
    for (unsigned int i = 0; i < 4; i++) {
      const unsigned int w = s < packed + raw ? arena[offsets[s] + raw_word + i]
                                              : tail[(s - packed - raw) * RAW_WORDS + raw_word + i];
      x[2 * i] = widen<BF>(w);
      x[2 * i + 1] = widen<BF>(w >> 16);
    }
  } else {
    const unsigned int n = s - packed - raw - tailed;
    for (unsigned int i = 0; i < 8; i++) {
      x[i] = is_key ? (float)keys[(h * fresh + n) * DK + u * 8 + i] : (float)values[(h * fresh + n) * DV + u * 8 + i];
    }
    for (unsigned int i = 0; i < 4; i++) {
      rows[n * RAW_WORDS + raw_word + i] = narrow<BF>(x[2 * i]) | (narrow<BF>(x[2 * i + 1]) << 16);
    }
  }
  for (unsigned int i = 0; i < 8; i++) {
    if (is_key) all_keys[(h * total + s) * DK + u * 8 + i] = (T)x[i];
    else all_values[(h * total + s) * DV + u * 8 + i] = (T)x[i];
  }
"""


def supported(codec: RowCodec) -> bool:
    """Whether this device and this layer's format can take the path: a GPU, and codes of 4 or 8 bits."""
    format, shape = codec.format, codec.shape
    if backend() == "cpu" or format.keys is None or format.values is None:
        return False
    bits = {format.keys.bits, format.values.bits}
    return bits <= {4, 8} and shape.key_dim % ELEMENTS == 0 and shape.value_dim % ELEMENTS == 0


@cache
def _kernel(device: str) -> Callable[..., Any]:
    fast: Any = mx.fast
    make, header = (fast.metal_kernel, _METAL) if device == "metal" else (fast.cuda_kernel, _CUDA)
    kernel: Callable[..., Any] = make(
        name="gathered_rows", input_names=INPUTS, output_names=OUTPUTS, source=_BODY, header=header + _COMMON
    )
    return kernel


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
    whole_keys, whole_values, rows = _kernel(backend())(
        inputs=[
            stored.arena,
            stored.offsets if stored.offsets is not None else nothing,
            stored.tail if tailed else nothing,
            keys, values,
            mx.array([stored.packed, stored.raw, tailed, fresh], dtype=mx.uint32),
        ],
        template=[
            ("T", keys.dtype), ("H", shape.heads), ("DK", shape.key_dim), ("DV", shape.value_dim),
            ("KB", format.keys.bits), ("KG", format.keys.group), ("VB", format.values.bits), ("VG", format.values.group),
            ("RAW_WORDS", codec.raw_words), ("BF", codec.stored == mx.bfloat16),
        ],
        grid=(units * total * shape.heads, 1, 1),
        threadgroup=(256, 1, 1),
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
