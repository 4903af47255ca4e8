"""Folding: what was said since a view was made competes with the view's rows for its places."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from agentmem.episode.held import Held
from agentmem.episode.selection import Heads
from agentmem.episode.store import RowStore
from agentmem.episode.views import View, materialised
from agentmem.model.network import Network


def folded(
    network: Network, store: RowStore, view: View, prompt: Sequence[int], budgets: Sequence[int],
    dtype: mx.Dtype, *, block: int, heads: Heads = Heads.UNIFORM,
) -> View:  # fmt: skip
    """The view with all rows of the store considered: {its rows and those behind it} scored by `prompt`, cut to the budgets.

    At most `block` new rows at once, so that no more than a budget and a block are in memory.
    """
    while view.tokens < store.tokens:
        held = materialised(network, store, view, dtype, min(view.tokens + block, store.tokens))
        view = _cut(held, prompt, budgets, heads)
    return view


def viewed(
    network: Network, store: RowStore, prompt: Sequence[int], budgets: Sequence[int], dtype: mx.Dtype, *,
    block: int, heads: Heads = Heads.UNIFORM,
) -> View:  # fmt: skip
    """A view made block by block, as if the store's rows came now: each block competes with what was kept of those before it.

    `store_scores` asks all rows at once instead, for one reading of the prompt where this takes one a block.
    """
    none = tuple(np.zeros(0, np.int32) for _ in store.kinds)
    counts = tuple(np.zeros(kind.shape.heads, np.int32) for kind in store.kinds)
    start = View(none, counts, store.sinks)
    return folded(network, store, start, prompt, budgets, dtype, block=block, heads=heads)


def _cut(held: Held, prompt: Sequence[int], budgets: Sequence[int], heads: Heads) -> View:
    held.evict(held.score(prompt), budgets, heads)
    return View.of(held)
