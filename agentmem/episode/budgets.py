"""How many rows each layer keeps (EpiCache, section 3.4): more where keys depend on what stands far away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FLOOR = 4
"""No layer gets less than this part of an even share: the first layer's keys know no context at all."""


def even(layers: int, rows: int) -> list[int]:
    """Every layer keeps `rows`."""
    return [rows] * layers


def allotted(sensitivity: Sequence[float], rows: int, *, alpha: float = 1.0, unit: int = 1) -> list[int]:
    """Rows of each layer, `len(sensitivity) * rows` in all, in proportion to sensitivity ** alpha above a floor of rows / 4.

    Multiples of `unit`, by largest remainders. Raises ValueError where `rows` is no multiple of it.
    """
    if rows % unit:
        raise ValueError(f"{rows} rows a layer cannot be shared out in units of {unit}")
    weights = np.maximum(np.asarray(sensitivity, dtype=np.float64), 0) ** alpha
    layers, total = len(weights), len(weights) * rows // unit
    if not weights.sum():
        return even(layers, rows)
    floor = max(1, -(-rows // (FLOOR * unit)))
    shares = _filled(weights, float(floor), float(total))
    whole = np.floor(shares).astype(np.int64)
    left = total - int(whole.sum())
    for layer in np.argsort(-(shares - whole), kind="stable")[:left]:
        whole[layer] += 1
    return [int(w) * unit for w in whole]


def _filled(weights: NDArray[np.float64], floor: float, total: float) -> NDArray[np.float64]:
    """Shares that sum to `total`, in proportion to the weights wherever that is more than the floor."""
    low = np.zeros(len(weights), dtype=bool)
    while True:
        free = total - floor * low.sum()
        shares = np.where(low, floor, weights / max(weights[~low].sum(), 1e-300) * free)
        below = (shares < floor) & ~low
        if not below.any():
            return shares
        low |= below
