"""Which rows stay: the best of each head, or the best of all heads of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


class Heads(StrEnum):
    """How a layer's rows are shared among its KV heads.

    `uniform`: every head keeps as many. `ragged`: the layer's best rows stay, whichever head they are of (Ada-KV).
    """

    UNIFORM = "uniform"
    RAGGED = "ragged"


def selected(scores: Sequence[NDArray[np.float32]], keep: int, heads: Heads = Heads.UNIFORM) -> list[Ids]:
    """Of each head the places of the rows that stay, ascending.

    scores: of each head [n], rows in the order of their positions. At most `keep` rows stay a head, on average if heads are
    ragged. Of equal scores the lowest position wins, and of one position the first head.
    """
    assert keep >= 0
    if heads is Heads.UNIFORM:
        return [np.sort(np.argsort(-s, kind="stable")[:keep]).astype(np.int32) for s in scores]
    every = np.concatenate([np.asarray(s) for s in scores])
    head = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    place = np.concatenate([np.arange(len(s)) for s in scores])
    best = np.lexsort((head, place, -every))[: keep * len(scores)]
    return [np.sort(place[best[head[best] == h]]).astype(np.int32) for h in range(len(scores))]
