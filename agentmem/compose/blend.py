"""CacheBlend (arXiv 2405.16444): reuse, and read anew the tokens whose values differ most from what they are here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.compose.planners import Piece
from agentmem.compose.prompt import Prompt
from agentmem.compose.state import joined
from agentmem.errors import ModelUnavailable
from agentmem.model.network import Network

RATIO = 0.16
CHECK_LAYER = 1


class Rows:
    """One layer of a prompt of which some tokens are read anew: a cache for rows of one token each, at any position.

    keys, values [heads, n, dim]: what the layer holds, keys rotated. Row i of a pass is token `at[i]`; it sees every token up to
    itself, those of the pass as the pass makes them.
    """

    def __init__(self, keys: mx.array, values: mx.array, at: np.ndarray) -> None:
        self.keys, self.values = keys, values
        self.offset = mx.array(at.astype(np.int32))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:  # fmt: skip
        """queries [rows, heads, 1, dim] -> the same shape."""
        self.keys = self._replaced(self.keys, keys)
        self.values = self._replaced(self.values, values)
        # By position: the rows do not lie side by side, so no triangle of theirs is causal.
        visible = mx.arange(self.keys.shape[1])[None] <= self.offset[:, None]
        out = mx.fast.scaled_dot_product_attention(
            queries[:, :, 0].transpose(1, 0, 2)[None], self.keys[None], self.values[None], scale=scale,
            mask=visible, sinks=sinks,
        )  # fmt: skip
        return out[0].transpose(1, 0, 2)[:, :, None]

    def _replaced(self, held: mx.array, fresh: mx.array) -> mx.array:
        new = mx.array(held)
        new[:, self.offset] = fresh[:, :, 0].transpose(1, 0, 2).astype(held.dtype)
        return new


def blend(
    network: Network, prompt: Prompt, pieces: Sequence[Piece], ratio: float = RATIO, check: int = CHECK_LAYER
) -> mx.array:
    """Fill an empty prompt; returns the logits [vocab] behind its last token.

    Read anew are the text behind the last slot and `ratio` of the other tokens behind the first piece: those whose values at
    layer `check` deviate most from the reused ones. Up to that layer all tokens are read. Raises ModelUnavailable where the
    layers of a model cannot be run one by one.
    """
    if not network.walks:
        raise ModelUnavailable("the layers of this model cannot be run one by one: it cannot be blended")
    assert len(prompt) == 0
    first, *others = pieces
    prompt.put(first.ids, first.base)
    ids = [i for p in others for i in p.ids]
    always = len(_tail(others))
    at = np.arange(len(prompt), len(prompt) + len(ids))
    prompt.put(ids, joined([p.base for p in others]))
    hidden = network.embedded(mx.array([ids], dtype=mx.int32)).swapaxes(0, 1)
    for number, line in enumerate(prompt.lines):
        assert line.keys is not None
        assert line.values is not None
        rows = Rows(line.keys, line.values, at)
        hidden = network.layer(number, hidden, rows)
        if number == check:
            chosen = selected(line.values[:, at[0] :], rows.values[:, at[0] :], ratio, always)
            at, hidden = at[chosen], hidden[mx.array(chosen)]
        line.keys, line.values = rows.keys, rows.values
    prompt.read_tokens += len(at)
    return network.finished(hidden[-1:])[0, 0]


def selected(held: mx.array, fresh: mx.array, ratio: float, always: int) -> np.ndarray:
    """Tokens to read anew, in order: the last `always`, and `ratio` of the others, by the squared deviation of their values.

    held, fresh [heads, n, dim] -> int [int(ratio * (n - always)) + always].
    """
    n = held.shape[1]
    apart = ((fresh.astype(mx.float32) - held.astype(mx.float32)) ** 2).sum(axis=(0, 2))
    scores = np.array(apart)[: n - always]
    count = int(ratio * len(scores))
    best = np.argsort(-scores, kind="stable")[:count]
    return np.concatenate([np.sort(best), np.arange(n - always, n)]).astype(np.int64)


def _tail(pieces: Sequence[Piece]) -> list[int]:
    """What stands behind the last slot; one token at least."""
    tail: list[int] = []
    for piece in reversed(pieces):
        if piece.slot is not None:
            break
        tail = [*piece.ids, *tail]
    return tail or [pieces[-1].ids[-1]]
