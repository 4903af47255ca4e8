"""How the model's layers see cached rows during one forward pass, and what a pass takes along: keys, values, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.episode.line import Line
from agentmem.episode.scores import CHUNK, cross_scores
from agentmem.model.network import Network
from agentmem.quant.attention import whole_attention

Fetch = Callable[[], Line]
Scores = list[list[np.ndarray]]
"""Of each layer, of each head: float32 [n] of its body and tail."""


class Pass:
    """One layer's cache for one pass: every cached row is visible to every token, and tokens see themselves causally.

    `offset` is where the pass begins, which the number of rows does not say. A batch of passes begins at one place and shares
    the rows. Rows are fetched when the layer runs and let go behind it.
    """

    def __init__(self, fetch: Fetch, offset: int) -> None:
        self._fetch = fetch
        self.offset = offset
        self.keys = self.values = mx.zeros((0,))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, n: int, **_: Any) -> str | None:
        return "causal" if n > 1 else None

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:  # fmt: skip
        line = self._fetch()
        self.keys, self.values = line.kind.key_map.keys(keys), values
        queries = line.kind.key_map.queries(queries)
        past = line.past(keys.dtype)
        self.seen(line, queries, past, scale)
        return _attention(queries, self.keys, values, past, scale, sinks)

    def seen(self, line: Line, queries: mx.array, past: tuple[Any, ...], scale: float) -> None:
        """What else is to be made of a layer's queries, mapped, and its rows."""


class Scored(Pass):
    """A pass that scores rows and leaves nothing behind."""

    def __init__(self, fetch: Fetch, offset: int, chunk: int) -> None:
        super().__init__(fetch, offset)
        self._chunk = chunk
        self.scores: list[np.ndarray] = []

    def attend(self, *arrays: mx.array, **options: Any) -> mx.array:
        out = super().attend(*arrays, **options)
        mx.eval(out)  # so that no layer's rows wait for the layers behind it
        return out

    def seen(self, line: Line, queries: mx.array, past: tuple[Any, ...], scale: float) -> None:
        keys, _, visible = past
        found = cross_scores(queries[0], keys, scale=scale, visible=visible, chunk=self._chunk)
        self.scores = line.candidates(np.array(found))


def prompt_scores(
    network: Network, lines: Sequence[Fetch], prompt: Sequence[int], offset: int, chunk: int = CHUNK
) -> Scores:
    """Read `prompt` as if it followed at position `offset`, and score the rows of every layer by it."""
    passes = [Scored(line, offset, chunk) for line in lines]
    # Nothing evaluates what the last layer makes of it: scores are there before.
    network.logits(mx.array([list(prompt)], dtype=mx.int32), passes, [])
    return [p.scores for p in passes]


def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, past: tuple[mx.array, mx.array, mx.array | None],
    scale: float, sinks: mx.array | None,
) -> mx.array:  # fmt: skip
    batch, heads, n = keys.shape[:3]
    old_keys, old_values, visible = past
    rows = old_keys.shape[1]
    if rows:
        keys, values = (
            mx.concatenate([mx.broadcast_to(old[None], (batch, *old.shape)), new], axis=2)
            for old, new in ((old_keys, keys), (old_values, values))
        )
    if visible is None:
        return whole_attention(queries, keys, values, scale=scale, sinks=sinks)
    group = queries.shape[1] // heads
    before = mx.broadcast_to(mx.repeat(visible, group, axis=0)[:, None], (heads * group, n, rows))
    own = mx.broadcast_to(mx.tril(mx.ones((n, n), dtype=mx.bool_))[None], (heads * group, n, n))
    mask = mx.concatenate([before, own], axis=2)[None]
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
