"""A proof at the start that the caches we give a model mean to it what its own do."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.pool import Pool
from agentmem.engine.carry import Carry
from agentmem.engine.feed import Feed
from agentmem.engine.layout import Layout
from agentmem.engine.table import Table
from agentmem.errors import ModelUnavailable
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network
from agentmem.model.unsound import unsound
from agentmem.quant.attention import reference_path

PASSES = (13, 9)
"""Tokens that are read, pass by pass; then some are fed one by one."""
STEPS = 2
TOLERANCE = 0.05
"""Of the size of the logits: rows are kept in 16 bits, and the model's own in its own precision."""


def prove(model: LoadedModel, plan: Layout) -> None:
    """Run a few tokens with our caches and with the model's own. Raises ModelUnavailable where they do not agree.

    `plan` must be of a format that packs nothing before a page is full, which all do.
    """
    ids = [(7 * i + 3) % min(250, model.tokenizer.vocab_size) for i in range(sum(PASSES) + STEPS)]
    with unsound("this model does not run with our caches"):
        ours, own = _ours(model, plan, ids), _own(model, ids)
    for got, want in zip(ours, own, strict=True):
        if np.abs(got - want).max() > TOLERANCE * np.abs(want).max():
            raise ModelUnavailable(
                "this model says other things with our caches than with its own; it keeps state in a way that is not supported"
            )


def _own(model: LoadedModel, ids: list[int]) -> list[np.ndarray]:
    caches = make_prompt_cache(model.model)
    return [_floats(model.model(mx.array([part]), cache=caches)[0, -1]) for part in _parts(ids)]


def _ours(model: LoadedModel, plan: Layout, ids: list[int]) -> list[np.ndarray]:
    g, out = plan.geometry, list[np.ndarray]()
    pool = Pool(Geometry(g.codecs, g.page_tokens, g.key_maps, 0, g.latent), 16 * g.slot_bytes, "proof")
    table, feed = Table(pool, reference_path), Feed(Network(model.model), plan.anatomy)
    table.carry = Carry(plan.baggage) if plan.baggage is not None else None
    for part in _parts(ids):
        if len(part) > 1:
            chunk = feed.chunk(table, part, [len(part) - 1])
            mx.eval(chunk.arrays)
            chunk.apply()
            out.append(_floats(chunk.logits[0]))
            continue
        table.reserve()
        fed = feed.step([table], mx.array(part), [0], plan.query_heads, None)
        mx.eval(fed.arrays)
        fed.apply(part, [0])
        out.append(_floats(fed.logits[0]))
    table.release()
    return out


def _parts(ids: list[int]) -> list[list[int]]:
    ends = [0, *np.cumsum([*PASSES, *[1] * STEPS]).tolist()]
    return [ids[a:b] for a, b in pairwise(ends)]


def _floats(logits: mx.array) -> np.ndarray:
    return np.array(logits.astype(mx.float32))
