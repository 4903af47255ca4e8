"""A small geometry and rows to fill it with."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from agentmem.blockpool.extent import ExtentData
from agentmem.blockpool.geometry import Geometry
from agentmem.quant.format import LayerShape, kv_format
from agentmem.quant.rows import RowCodec

PAGE = 16


def geometry(*shapes: LayerShape, name: str = "q4-plain", page_tokens: int = PAGE) -> Geometry:
    """Two unequal layers unless told otherwise."""
    layers = shapes or (LayerShape(1, 64, 64), LayerShape(2, 64, 64))
    codecs = tuple(RowCodec(s, kv_format(name).for_shape(s), mx.float16) for s in layers)
    return Geometry(codecs, page_tokens)


def raw_rows(g: Geometry, n: int, seed: int = 0) -> list[mx.array]:
    """Raw rows of every layer."""
    out = []
    for layer, c in enumerate(g.codecs):
        keys, values = mx.random.split(mx.random.key(1000 * seed + layer))
        out.append(
            c.raw(
                mx.random.normal((c.shape.heads, n, c.shape.key_dim), key=keys),
                mx.random.normal((c.shape.heads, n, c.shape.value_dim), key=values),
            )
        )
    mx.eval(out)
    return out


def packed_rows(g: Geometry, n: int, seed: int = 0) -> list[mx.array]:
    """Packed rows of every layer."""
    rows = [c.pack(r) for c, r in zip(g.codecs, raw_rows(g, n, seed), strict=True)]
    mx.eval(rows)
    return rows


def extent_data(g: Geometry, packed: int, raw: int, seed: int = 0) -> ExtentData:
    """What a commit of that many rows would write."""
    return ExtentData(
        fingerprint="f" * 64,
        namespace="default",
        tokens=np.arange(packed + raw, dtype=np.int32) + seed,
        packed=[np.array(r) for r in packed_rows(g, packed, seed)]
        if packed
        else [_none(w) for w in g.packed_words],
        raw=[np.array(r) for r in raw_rows(g, raw, seed)] if raw else [_none(w) for w in g.raw_words],
        pages=[
            {
                "key": "00",
                "parent": "ff",
                "raw": False,
                "rows": packed + raw,
                "pieces": [[None, 0, 0, 0, packed]],
            }
        ],
    )


def _none(words: int) -> np.ndarray:
    return np.zeros((0, words), np.uint32)
