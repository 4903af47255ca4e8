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
from mlx_lm.models.cache import ArraysCache

from agentmem.errors import ModelUnavailable
from agentmem.model.anatomy import Probe, check_own, leaves, probes

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
    if cache is None:
        check_own(keys)
    if attend is None:
        return _original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)  # type: ignore[arg-type]
    return attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def install(model: nn.Module) -> None:
    """Put our dispatch into every module that `model`'s classes come from; idempotent.

    Raises ModelUnavailable when mlx-lm's function has another signature. Layers that do not use it get whole keys and values,
    see `agentmem.model.anatomy`.
    """
    if tuple(inspect.signature(_original).parameters) != SIGNATURE:
        raise ModelUnavailable("this mlx-lm has another attention interface; install mlx-lm 0.32")
    names = {type(m).__module__ for _, m in model.named_modules()} | {type(model).__module__}
    for module in (sys.modules[n] for n in names if n.startswith("mlx_lm.models.") and n != base.__name__):
        if getattr(module, NAME, None) in (_original, _dispatch):
            setattr(module, NAME, _dispatch)


def keys_at(model: nn.Module, ids: list[list[int]], offset: int | mx.array) -> list[mx.array]:
    """The keys [rows, heads, n, key_dim] of every layer over token ids [rows][n] without a history, rotated as if at `offset`."""
    caches, seen = probes(model, lambda: Probe(offset))
    model(mx.array(ids), cache=caches)
    return [p.keys for p in seen]


def takes_ragged_rows(model: nn.Module) -> bool:
    """Whether the rows of one pass may begin at different positions: whether their keys are those of passes of their own.

    Models do that by handing `cache.offset` to their rotary embedding, which takes one number for each row too.
    """
    if all(isinstance(c, ArraysCache) for c in leaves(model)[0]):
        return True
    starts = (0, 7)

    def rows(count: int, offset: int | mx.array) -> mx.array:
        caches, seen = probes(model, lambda: Probe(offset))
        model(mx.array([[0, 1]] * count), cache=caches)
        held = [x.reshape(count, -1) for p in seen for x in (p.keys, p.values)]
        return mx.concatenate(held, axis=1).astype(mx.float32)

    alone = mx.concatenate([rows(1, start) for start in starts])
    try:
        together = rows(len(starts), mx.array(starts))
        same = mx.allclose(together, alone, rtol=2e-2, atol=2e-2).item()
    except (TypeError, ValueError, RuntimeError) as error:
        log.warning("this model runs one sequence at a time: %s", error)
        return False
    if same:
        return True
    log.warning("this model runs one sequence at a time: it places all rows of a pass at one position")
    return False
