"""What a prompt looks at among cached rows (EpiCache, section 3.2; KVzip): the score that eviction goes by."""

from __future__ import annotations

import mlx.core as mx

CHUNK = 128
"""Prompt tokens whose attention is made at once: heads x 128 x rows elements of scratch."""


def cross_scores(
    queries: mx.array, keys: mx.array, *, scale: float, visible: mx.array | None = None, chunk: int = CHUNK
) -> mx.array:
    """The most attention that any query of a head's group pays to each row: float32 [heads, n].

    queries [query heads, tokens, dim], keys [heads, n, dim], both mapped alike; visible bool [heads, n], False for room.
    Softmax runs in float32 over the cached rows alone: what the prompt's tokens see of each other takes nothing away. Every
    token's softmax is its own, so a running maximum over chunks is the maximum over all tokens.
    """
    heads, dim = keys.shape[0], keys.shape[2]
    grouped = queries.astype(mx.float32).reshape(heads, -1, queries.shape[1], dim) * scale
    turned = keys.astype(mx.float32).swapaxes(-1, -2)
    best: mx.array | None = None
    for start in range(0, queries.shape[1], chunk):
        some = grouped[:, :, start : start + chunk].reshape(heads, -1, dim)
        products = some @ turned
        if visible is not None:
            products = mx.where(visible[:, None], products, -mx.inf)
        found = mx.softmax(products, axis=-1).max(axis=1)
        best = found if best is None else mx.maximum(best, found)
    assert best is not None, "a prompt of no tokens scores nothing"
    return best
