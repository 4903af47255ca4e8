"""Stages: host memory that files are read into and that MLX then reads on a discrete GPU."""

from __future__ import annotations

import ctypes
import logging
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.quant.device import backend

log = logging.getLogger(__name__)

VECTOR = 4
"""Words that one GPU thread copies."""

_PORTABLE_AND_MAPPED = 3

_COPY = """
  const size_t i = cooperative_groups::this_grid().thread_rank();
  if (i < count[0]) ((uint4*)rows)[i] = ((const uint4*)address[0])[i];
"""


class Stage(ABC):
    """Room for `words` words. Host threads write to `memory`, uint32 [words]; the engine thread calls `load`."""

    memory: np.ndarray

    @property
    def words(self) -> int:
        return int(self.memory.size)

    @abstractmethod
    def load(self, words: int) -> mx.array:
        """The first words as an MLX array uint32 [words], lazily. To be evaluated before `memory` is written again."""


class SharedStage(Stage):
    """Memory of an MLX array of the CPU stream: any backend reads it; on CUDA page by page, at a fifth of the bus's rate."""

    def __init__(self, words: int) -> None:
        self._array = mx.zeros((words,), mx.uint32, stream=mx.cpu)
        mx.eval(self._array)
        self.memory = np.array(self._array, copy=False)

    def load(self, words: int) -> mx.array:
        return self._array[:words]


class PinnedStage(Stage):
    """Page-locked memory that a CUDA kernel reads over the bus. Raises OSError where the driver refuses it."""

    def __init__(self, words: int) -> None:
        words += -words % VECTOR
        self._pages = mmap.mmap(-1, 4 * words)
        self.memory = np.frombuffer(self._pages, dtype=np.uint32)
        self.memory[:] = 0
        self._address = _page_lock(self.memory)

    def load(self, words: int) -> mx.array:
        count = -(-words // VECTOR)
        (rows,) = _copy_kernel()(
            inputs=[
                mx.array(np.array([self._address], np.uint64)),
                mx.array(np.array([count], np.uint64)),
            ],
            grid=(count, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[(count * VECTOR,)],
            output_dtypes=[mx.uint32],
        )
        return rows[:words]

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            _driver().cuMemHostUnregister(ctypes.c_void_p(self._address))


def make_stage(words: int) -> Stage:
    """The fastest stage that this machine allows."""
    if backend() == "cuda":
        try:
            return PinnedStage(words)
        except OSError as e:
            log.warning("restores read memory that is not page-locked, which is slower: %s", e)
    return SharedStage(words)


@cache
def _copy_kernel() -> Callable[..., Any]:
    fast: Any = mx.fast
    kernel: Callable[..., Any] = fast.cuda_kernel(
        name="stage_copy", input_names=["address", "count"], output_names=["rows"], source=_COPY
    )
    return kernel


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _page_lock(memory: np.ndarray) -> int:
    """Lock `memory` in the context that MLX uses, the device's primary one; returns its address on the device."""
    driver = _driver()
    device, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    host = ctypes.c_void_p(memory.ctypes.data)
    for name, *arguments in (
        ("cuInit", 0),
        ("cuDeviceGet", ctypes.byref(device), 0),
        ("cuDevicePrimaryCtxRetain", ctypes.byref(context), device),
        ("cuCtxSetCurrent", context),
        ("cuMemHostRegister_v2", host, ctypes.c_size_t(memory.nbytes), _PORTABLE_AND_MAPPED),
        ("cuMemHostGetDevicePointer_v2", ctypes.byref(address), host, 0),
    ):
        status = getattr(driver, name)(*arguments)
        if status != 0:
            raise OSError(f"{name} answers {status}")
    assert address.value is not None
    return address.value
