"""Full tails become pages, those of all tables of a step in one go: packing takes many small operations, however few rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from agentmem.blockpool.geometry import WORD
from agentmem.blockpool.pool import Pool
from agentmem.engine.table import Table
from agentmem.quant.rows import RowCodec

AT_ONCE = 32 << 20
"""Bytes of raw rows that are packed in one go."""


def seal(tables: Sequence[Table]) -> dict[int, Exception]:
    """Make pages of full tails, in the slots that their tables reserved. Returns which of `tables` failed, and why.

    Raises nothing: one that fails fails alone.
    """
    if not tables:
        return {}
    try:
        _seal(tables)
    except Exception as error:
        if len(tables) == 1:
            return {0: error}
        alone = [seal([table]) for table in tables]
        return {i: failed[0] for i, failed in enumerate(alone) if failed}
    return {}


def _seal(tables: Sequence[Table]) -> None:
    """Nothing has changed but the content of reserved slots when it raises."""
    pool = tables[0].pool
    packing = [t for t in tables if not t.next_is_raw]
    if packing:
        packed = _packed(pool, [t.place for t in packing])
        mx.eval(packed)
        pool.arena.write_packed([slot for t in packing for slot in t.reserved], packed)
    for table in tables:
        if table.next_is_raw:
            rows = [table.tail(layer) for layer in range(pool.geometry.layers)]
            mx.eval(rows)
            pool.arena.write_raw(table.reserved, rows)
    for table in tables:
        table.close_page()


def _packed(pool: Pool, places: list[int]) -> list[mx.array]:
    """The tails at `places`, all of them full, packed: for every layer uint32 [len(places) * page_tokens, packed_words]."""
    g = pool.geometry
    n = len(places) * g.page_tokens
    out: dict[int, mx.array] = {}
    for codec, layers in _alike(g.codecs, AT_ONCE // (n * WORD)):
        rows = codec.pack(pool.tails.whole(layers, places))
        out |= {layer: rows[i * n : (i + 1) * n] for i, layer in enumerate(layers)}
    return [out[layer] for layer in range(g.layers)]


def _alike(codecs: Sequence[RowCodec], words: int) -> Iterator[tuple[RowCodec, list[int]]]:
    """Layers of one codec, as many at once as have at most `words` raw words a row together, but at least one."""
    for codec in dict.fromkeys(codecs):
        layers = [i for i, c in enumerate(codecs) if c == codec]
        several = max(1, words // codec.raw_words)
        for at in range(0, len(layers), several):
            yield codec, layers[at : at + several]
