"""How much of a layer's keys depends on what stands far away (EpiCache, section 3.4): measured once a model."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from agentmem.episode.held import PIECE, Held
from agentmem.episode.line import Line
from agentmem.episode.rows import whole_kinds
from agentmem.episode.selection import Ids
from agentmem.model.network import Network
from agentmem.quant.format import LayerShape

BLOCK = 4096
FAR = 128
"""First tokens that every block sees."""


def sensitivity(
    network: Network, shapes: Sequence[LayerShape], dtype: mx.Dtype, ids: Sequence[int], *,
    block: int = BLOCK, sinks: int = FAR,
) -> list[float]:  # fmt: skip
    """Of each layer 1 - the mean cosine, over heads and tokens, of keys read causally and keys read block by block.

    A block sees itself, the first `sinks` tokens and the later half of the block before it. The text is read twice, in pieces;
    the rows of the first reading stay in memory. The first layer's is 0.
    """
    whole = Held.empty(network, whole_kinds(shapes, dtype), dtype, 0)
    blocked = Held.empty(network, whole_kinds(shapes, dtype), dtype, 0)
    sums, counted = np.zeros(len(shapes)), 0
    for start in range(0, len(ids), block):
        some = ids[start : start + block]
        for held in (whole, blocked):
            held.absorb(some, piece=min(PIECE, block))
        sums += [_cosines(a, b, len(some)) for a, b in zip(whole.lines, blocked.lines, strict=True)]
        counted += len(some)
        for line in blocked.lines:
            line.keep(
                [_places(_seen_next(p, start + len(some), block, sinks)) for p in line.candidate_positions()]
            )
        mx.eval([line.body for line in blocked.lines])
    return [max(0.0, float(1 - s / counted)) for s in sums]


def _seen_next(positions: np.ndarray, stop: int, block: int, sinks: int) -> np.ndarray:
    return (positions < sinks) | (positions >= stop - block // 2)


def _cosines(one: Line, other: Line, last: int) -> float:
    """Sum over the last tokens of the mean over heads of their keys' cosine."""
    (a, _), (b, _) = (line.kind.body.parts(line.tail[:, -last:], mx.float32) for line in (one, other))
    size = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(axis=-1) / mx.maximum(size, 1e-20)
    return float(np.array(cosine.mean(axis=0)).sum())


def _places(chosen: np.ndarray) -> Ids:
    return np.flatnonzero(chosen).astype(np.int32)
