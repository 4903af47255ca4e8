"""The one place that touches mlx-lm's internals: our attention inside its models.

mlx-lm models call `cache.update_and_fetch(k, v)` and then `scaled_dot_product_attention(q, k, v, cache=..., ...)`, a name
that each model module imports. `install` replaces that name in the loaded model's modules; a cache that can `attend` is
asked, every other cache goes the old way.
"""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, make_prompt_cache

from agentmem.errors import ModelUnavailable
from agentmem.quant.format import LayerShape

log = logging.getLogger(__name__)

NAME = "scaled_dot_product_attention"
SIGNATURE = ("queries", "keys", "values", "cache", "scale", "mask", "sinks")

_original = base.scaled_dot_product_attention


def _dispatch(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    attend = getattr(cache, "attend", None)
    if attend is None:
        return _original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)  # type: ignore[arg-type]
    return attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def install(model: nn.Module) -> None:
    """Put our dispatch into every module that `model`'s classes come from; idempotent.

    Raises ModelUnavailable when mlx-lm's function has another signature, or when no module of the model uses it.
    """
    if tuple(inspect.signature(_original).parameters) != SIGNATURE:
        raise ModelUnavailable("this mlx-lm has another attention interface; install mlx-lm 0.32")
    names = {type(m).__module__ for _, m in model.named_modules()} | {type(model).__module__}
    patched = False
    for module in (sys.modules[n] for n in names if n.startswith("mlx_lm.models.") and n != base.__name__):
        if getattr(module, NAME, None) in (_original, _dispatch):
            setattr(module, NAME, _dispatch)
            patched = True
    if not patched:
        raise ModelUnavailable(
            f"models of type {type(model).__module__} bypass mlx-lm's attention; they are not supported"
        )


class _Probe:
    """A cache that notes the geometry of one layer's attention."""

    def __init__(self, offset: int | mx.array = 0) -> None:
        self.offset = offset
        self.shape: LayerShape | None = None
        self.query_heads = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3])
        self.keys = keys
        self.dtype = keys.dtype
        return keys, values

    def make_mask(self, n: int, **_: Any) -> None:
        return None

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        self.query_heads = queries.shape[1]
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=options["scale"])


def probe(model: nn.Module) -> tuple[list[LayerShape], int, mx.Dtype]:
    """KV geometry of every layer, query heads, and the dtype of keys, from a run over one token.

    Raises ModelUnavailable for layers that are not plain full attention (windows, latents, recurrent state).
    """
    kinds = {type(c).__name__ for c in make_prompt_cache(model)}
    if kinds != {KVCache.__name__}:
        raise ModelUnavailable(
            f"this model keeps state of the kinds {sorted(kinds)}; only full attention is supported so far"
        )
    probes = [_Probe() for _ in make_prompt_cache(model)]
    mx.eval(model(mx.array([[0]]), cache=probes))
    shapes = [p.shape for p in probes]
    if any(s is None or p.query_heads == 0 for s, p in zip(shapes, probes, strict=True)):
        raise ModelUnavailable(
            "a layer of this model does not go through mlx-lm's attention; it is not supported"
        )
    return [s for s in shapes if s is not None], probes[0].query_heads, probes[0].dtype


def keys_at(model: nn.Module, ids: list[list[int]], offset: int | mx.array) -> list[mx.array]:
    """The keys [rows, heads, n, key_dim] of every layer over token ids [rows][n] without a history, rotated as if at `offset`."""
    probes = [_Probe(offset) for _ in make_prompt_cache(model)]
    model(mx.array(ids), cache=probes)
    return [p.keys for p in probes]


def takes_ragged_rows(model: nn.Module) -> bool:
    """Whether the rows of one pass may begin at different positions: whether their keys are those of passes of their own.

    Models do that by handing `cache.offset` to their rotary embedding, which takes one number for each row too.
    """
    starts = (0, 7)

    def keys(rows: int, offset: int | mx.array) -> mx.array:
        return mx.stack(keys_at(model, [[0, 1]] * rows, offset)).astype(mx.float32)

    alone = mx.concatenate([keys(1, start) for start in starts], axis=1)
    try:
        together = keys(len(starts), mx.array(starts))
        same = mx.allclose(together, alone, rtol=2e-2, atol=2e-2).item()
    except (TypeError, ValueError, RuntimeError) as error:
        log.warning("this model runs one sequence at a time: %s", error)
        return False
    if same:
        return True
    log.warning("this model runs one sequence at a time: it places all rows of a pass at one position")
    return False
