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
Past = tuple[mx.array, mx.array, mx.array | None]
"""As `Line.past` gives it."""


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
        return _attention(queries, self.keys, values, self.before(past), scale, sinks)

    def before(self, past: Past) -> Past:
        """What the pass attends to besides itself."""
        return past

    def seen(self, line: Line, queries: mx.array, past: Past, scale: float) -> None:
        """What else is to be made of a layer's queries, mapped, and its rows."""


class Scored(Pass):
    """A pass that scores rows, behind earlier pieces of its prompt, whose keys, mapped, and values [1, heads, n, dim] are `said`.

    Precondition for a second piece: heads have rows of equal number.
    """

    def __init__(self, fetch: Fetch, offset: int, chunk: int, said: Sequence[mx.array] = ()) -> None:
        super().__init__(fetch, offset)
        self._chunk, self.said = chunk, said
        self.scores: list[np.ndarray] = []

    def before(self, past: Past) -> Past:
        if not self.said:
            return past
        (keys, values, visible), (own_keys, own_values) = past, self.said
        assert visible is None
        together = (mx.concatenate([a, b[0]], axis=1) for a, b in ((keys, own_keys), (values, own_values)))
        return next(together), next(together), None

    def attend(self, *arrays: mx.array, **options: Any) -> mx.array:
        out = super().attend(*arrays, **options)
        own = [self.keys, self.values]
        if self.said:
            own = [mx.concatenate([a, b], axis=2) for a, b in zip(self.said, own, strict=True)]
        self.said = own
        mx.eval(out, own)  # so that no layer's rows wait for the layers behind it
        return out

    def seen(self, line: Line, queries: mx.array, past: Past, scale: float) -> None:
        keys, _, visible = past
        found = cross_scores(queries[0], keys, scale=scale, visible=visible, chunk=self._chunk)
        self.scores = line.candidates(np.array(found))


class Sounding:
    """Scores the rows of every layer by a prompt behind position `offset`, a piece of the prompt each `step`.

    Every token's softmax is its own, so the maximum over pieces is that of the whole prompt.
    """

    def __init__(
        self, network: Network, lines: Sequence[Fetch], prompt: Sequence[int], offset: int, piece: int = CHUNK
    ) -> None:
        assert prompt
        self._network, self._lines, self._prompt = network, lines, list(prompt)
        self._offset, self._piece = offset, piece
        self._said: list[Sequence[mx.array]] = [() for _ in lines]
        self._at = 0
        self.scores: Scores = []

    @property
    def done(self) -> bool:
        return self._at >= len(self._prompt)

    def step(self) -> bool:
        """Read the next piece; returns whether that was the last one."""
        some = self._prompt[self._at : self._at + self._piece]
        offset = self._offset + self._at
        passes = [
            Scored(line, offset, self._piece, said)
            for line, said in zip(self._lines, self._said, strict=True)
        ]
        self._network.logits(mx.array([some], dtype=mx.int32), passes, [])
        self._said = [p.said for p in passes]
        found = [p.scores for p in passes]
        self.scores = (
            found
            if not self.scores
            else [
                [np.maximum(a, b) for a, b in zip(before, now, strict=True)]
                for before, now in zip(self.scores, found, strict=True)
            ]
        )
        self._at += len(some)
        return self.done


def prompt_scores(
    network: Network, lines: Sequence[Fetch], prompt: Sequence[int], offset: int, chunk: int = CHUNK
) -> Scores:
    """Read `prompt` as if it followed at position `offset`, and score the rows of every layer by it."""
    passes = [Scored(line, offset, chunk) for line in lines]
    # Nothing evaluates what the last layer makes of it: scores are there before.
    network.logits(mx.array([list(prompt)], dtype=mx.int32), passes, [])
    return [p.scores for p in passes]


def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, past: Past, scale: float, sinks: mx.array | None,
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
