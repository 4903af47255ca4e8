"""Which backend MLX runs on, and what follows for memory and arithmetic."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx
import numpy as np

Backend = Literal["cpu", "metal", "cuda"]


def backend() -> Backend:
    """The backend of MLX's default device."""
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def unified_memory() -> bool:
    """True where a host thread may write into an MLX array's memory (CPU and Apple Silicon)."""
    return backend() != "cuda"


def on_device(values: np.ndarray) -> mx.array:
    """`values`, lazily, in the memory that the device reads fastest.

    MLX leaves an array of the host's in the host's memory. On a discrete GPU every kernel that reads it waits for the bus:
    worth a copy for whatever all layers read.
    """
    array = mx.array(values)
    if unified_memory():
        return array
    return mx.logical_or(array, mx.array(False)) if array.dtype == mx.bool_ else array + 0


def leave_thread() -> None:
    """Call at the end of a thread that used MLX: a stream that is still there at interpreter exit aborts the process."""
    mx.clear_streams()
