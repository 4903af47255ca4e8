"""The same workload through stock mlx-lm: prompt caches saved to one file and loaded again."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from agentmem.quant.device import backend


def _forward(model: nn.Module, ids: list[int], caches: list[Any]) -> int:
    """Feed `ids` in one pass; the greedy next token."""
    token = mx.argmax(model(mx.array([ids]), cache=caches)[0, -1])
    mx.eval(token, [c.state[0] for c in caches])
    return int(token.item())  # type: ignore[arg-type]


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = action()
    return result, 1e3 * (time.perf_counter() - start)


def _dequantised(caches: list[QuantizedKVCache]) -> list[KVCache]:
    """16-bit caches with the contents of 4-bit ones, for backends where mlx-lm's quantised attention does not run."""
    plain = []
    for old in caches:
        new = KVCache()
        packed: tuple[Any, Any] = (old.keys, old.values)
        for name, part in zip(("keys", "values"), packed, strict=True):
            words, scales, biases = (x[..., : old.offset, :] for x in part)
            setattr(new, name, mx.dequantize(words, scales, biases, old.group_size, old.bits))
        new.offset = old.offset
        plain.append(new)
    return plain


def _first_token(model: nn.Module, path: Path, suffix: list[int], unpack: bool) -> int:
    caches = load_prompt_cache(str(path))
    return _forward(model, suffix, _dequantised(caches) if unpack else caches)


def measure(model: nn.Module, ids: list[int], folder: Path, *, chunk: int, repeats: int) -> dict[str, Any]:
    """Cold prefill of `ids`, then load + first token from a 16-bit (or float32) file and from a 4-bit file.

    The file holds all but the last token, which is fed after the load. The first load is reported on its own.

    On a GPU the prefill runs once before it is timed, so that kernels are compiled.
    """

    def prefill(caches: list[Any]) -> int:
        for at in range(0, len(ids) - 1, chunk):
            model(mx.array([ids[at : min(at + chunk, len(ids) - 1)]]), cache=caches)
            mx.eval([c.state[0] for c in caches])
        return _forward(model, ids[-1:], caches)

    if backend() != "cpu":
        prefill(make_prompt_cache(model))
    caches = make_prompt_cache(model)
    _, cold = _timed(lambda: prefill(caches))
    for c in caches:
        c.trim(1)
    quantised = [c.to_quantized(group_size=64, bits=4) for c in caches]
    out: dict[str, Any] = {"cold_ms": cold}
    for name, saved in (("full", caches), ("q4", quantised)):
        path = folder / f"stock-{name}.safetensors"
        save_prompt_cache(str(path), saved)
        unpack = name == "q4" and not _runs(model, path, ids[-1:])
        load = partial(_first_token, model, path, ids[-1:], unpack)
        first, *times = [_timed(load)[1] for _ in range(repeats + 1)]
        warm = sorted(times)[len(times) // 2]
        out[name] = {
            "dtype": str(caches[0].keys.dtype).removeprefix("mlx.core.") if name == "full" else "q4",
            "bytes": path.stat().st_size,
            "first_ms": first,
            "warm_ms": warm,
            "speedup": cold / warm,
            "attention": "dequantised first" if unpack else "stock",
        }
        path.unlink()
    return out


def _runs(model: nn.Module, path: Path, suffix: list[int]) -> bool:
    """Whether mlx-lm's quantised attention runs here; on CUDA it lacks kernels for many shapes."""
    try:
        _first_token(model, path, suffix, False)
    except (RuntimeError, ValueError):
        return False
    return True
