"""The kernels on a CPU: compiled with the machine's C++ compiler, one library per shape."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from agentmem.quant.attention import StoredRows
from agentmem.quant.gather import ELEMENTS, THREADS
from agentmem.quant.kernels.decode import GROUP, _nothing, _settings, template
from agentmem.quant.kernels.plan import Batch
from agentmem.quant.rows import RowCodec

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")


@cache
def _library(shape: str) -> ctypes.CDLL:
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.so"
        subprocess.run(
            [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", f"-DSHAPE={shape}", f"-DWARPS={GROUP}",
             str(HERE / "kernels.cpp"), "-o", str(made)],
            check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(made))


def _word(value: object) -> str:
    return str(value).lower()


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def attend(
    codec: RowCodec, queries: mx.array, keys: mx.array, values: mx.array, arena: mx.array, tails: tuple[mx.array, int],
    batch: Batch, *, scale: float, sinks: mx.array | None = None, vectors: mx.array | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What `flash_decode` gives for float32 queries, in one launch as well as in two."""
    count, heads, _, _ = queries.shape
    dim = codec.shape.value_dim
    shape = template(codec, heads, batch.wide, vectors is not None)
    library = _library(",".join(map(_word, shape.values())))
    layout = batch.layout(codec, GROUP)
    held = [
        np.array(x, order="C")  # a copy: on a CPU, MLX aligns its arrays at 8 bytes
        for x in (
            queries, keys, values, _nothing() if vectors is None else vectors, arena, tails[0], layout.plan, batch.state,
            _settings(scale, tails[1]),
        )
    ]  # fmt: skip
    sunk = None if sinks is None else np.array(sinks, dtype=np.float32)
    sunk_at = _at(sunk) if sunk is not None else None
    outs = []
    for merges in (True, False):
        partial = np.full((layout.room, heads, dim + 2), np.nan, np.float32)
        arrivals = np.zeros((count, codec.shape.heads), np.uint32)
        rows = np.zeros((count, codec.raw_words), np.uint32)
        out = np.full((count, heads, 1, dim), np.nan, np.float32)
        library.run_decode(
            *map(_at, held),
            sunk_at,
            ctypes.c_uint(layout.bundles),
            merges,
            *map(_at, (arrivals, partial, rows, out)),
        )
        assert not arrivals.any(), "the next launch counts from zero"
        if not merges:
            library.run_combine(
                _at(partial), _at(held[6]), sunk_at, ctypes.c_uint(heads), ctypes.c_uint(count), _at(out)
            )
        outs.append(out)
    assert np.array_equal(*outs), "one launch and two are the same"
    return out, rows


def gather(
    codec: RowCodec, stored: StoredRows, keys: mx.array, values: mx.array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `gather` gives for a float32 chunk."""
    shape, fresh, tailed = codec.shape, keys.shape[2], stored.tail.shape[0]
    total = stored.packed + stored.raw + tailed + fresh
    library = _library(",".join(_word(v) for v in template(codec, shape.heads, False, False).values()))
    sizes = np.array([stored.packed, stored.raw, tailed, fresh], np.uint32)
    held = [np.ascontiguousarray(x) for x in (stored.arena, stored.offsets, stored.tail, keys, values, sizes)]
    whole_keys = np.full((1, shape.heads, total, shape.key_dim), np.nan, np.float32)
    whole_values = np.full((1, shape.heads, total, shape.value_dim), np.nan, np.float32)
    rows = np.zeros((fresh, codec.raw_words), np.uint32)
    threads = -(-total * shape.heads * (shape.key_dim + shape.value_dim) // ELEMENTS // THREADS) * THREADS
    library.run_gather(*map(_at, held), ctypes.c_uint(threads), _at(whole_keys), _at(whole_values), _at(rows))
    return whole_keys, whole_values, rows
