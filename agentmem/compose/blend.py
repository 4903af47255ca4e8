"""CacheBlend (arXiv 2405.16444): reuse, and read anew the tokens whose values differ most from what they are here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.compose.planners import Blend, Piece, Put, Read, Steps
from agentmem.compose.prompt import Prompt
from agentmem.compose.state import State, joined
from agentmem.errors import ModelUnavailable
from agentmem.model.network import Network
from agentmem.quant.format import LayerShape

log = logging.getLogger(__name__)

RATIO = 0.16
CHECK_LAYER = 1
MOST = 8192
"""Tokens of a prompt that is blended, at most: a layer's pass is one piece of work."""
TOLERANCE = 0.02
"""Of what can be blended, the largest difference of logits from a whole pass, against the largest logit."""
PASS = 128
"""Queries of one pass of attention: the scores of all tokens at once would be as many as the square of the prompt."""


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
        turned = queries[:, :, 0].transpose(1, 0, 2)[None]
        places, parts = mx.arange(self.keys.shape[1])[None], []
        for first in range(0, turned.shape[2], PASS):
            part = slice(first, first + PASS)
            parts.append(
                mx.fast.scaled_dot_product_attention(
                    turned[:, :, part], self.keys[None], self.values[None], scale=scale,
                    mask=places <= self.offset[part, None], sinks=sinks,
                )
            )  # fmt: skip
        return mx.concatenate(parts, axis=2)[0].transpose(1, 0, 2)[:, :, None]

    def _replaced(self, held: mx.array, fresh: mx.array) -> mx.array:
        new = mx.array(held)
        new[:, self.offset] = fresh[:, :, 0].transpose(1, 0, 2).astype(held.dtype)
        return new


class Walk:
    """Tokens behind the first `start` of a prompt on their way through the layers, fewer from layer `check` on.

    Who is `unknown`, bool [n], goes all the way, and `share` of the others: those whose values at that layer deviate most.
    """

    def __init__(
        self, network: Network, ids: Sequence[int], start: int, unknown: np.ndarray, share: float,
        check: int = CHECK_LAYER,
    ) -> None:  # fmt: skip
        self.at = np.arange(start, start + len(ids))
        self.hidden = network.embedded(mx.array([list(ids)], dtype=mx.int32)).swapaxes(0, 1)
        self.layers = 0
        self._network, self._start, self._unknown, self._share = network, start, unknown, share
        self._check = check

    def through(self, keys: mx.array, values: mx.array) -> Rows:
        """The next layer, of which this is held of the prompt; returns what it holds then."""
        rows = Rows(keys, values, self.at)
        self.hidden = self._network.layer(self.layers, self.hidden, rows)
        if self.layers == self._check:
            chosen = selected(
                values[:, self._start :], rows.values[:, self._start :], self._share, self._unknown
            )
            self.at, self.hidden = self.at[chosen], self.hidden[mx.array(chosen)]
        self.layers += 1
        return rows


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
    ids = tuple(i for p in others for i in p.ids)
    tail = np.arange(len(ids)) >= len(ids) - len(_tail(others))
    walk = mend(network, prompt, Blend(ids, joined([p.base for p in others]), tail, ratio), check)
    return network.finished(walk.hidden[-1:])[0, 0]


def mend(network: Network, prompt: Prompt, step: Blend, check: int = CHECK_LAYER) -> Walk:
    """Append the tokens of a blend to a prompt."""
    start = len(prompt)
    prompt.put(step.ids, step.state)
    walk = Walk(network, step.ids, start, step.unknown, step.share, check)
    for line in prompt.lines:
        assert line.keys is not None
        assert line.values is not None
        rows = walk.through(line.keys, line.values)
        line.keys, line.values = rows.keys, rows.values
    prompt.read_tokens += len(walk.at)
    return walk


def blended(steps: Steps, share: float = RATIO) -> Steps:
    """The same with all from the first Put to the last in one Blend: what is read between them has no state to begin with."""
    puts = [n for n, step in enumerate(steps) if isinstance(step, Put)]
    if not puts:
        return steps
    inner = steps[puts[0] : puts[-1] + 1]
    shapes = next(step.state for step in inner if isinstance(step, Put)).shapes
    width = sum(s.heads * (s.key_dim + s.value_dim) for s in shapes)
    states = [
        step.state if isinstance(step, Put) else State(mx.zeros((len(step.ids), width)), shapes)
        for step in inner
    ]
    unknown = np.repeat([isinstance(step, Read) for step in inner], [len(step.ids) for step in inner])
    ids = tuple(i for step in inner for i in step.ids)
    return [*steps[: puts[0]], Blend(ids, joined(states), unknown, share), *steps[puts[-1] + 1 :]]


def can_blend(network: Network, shapes: Sequence[LayerShape], dtype: mx.Dtype) -> bool:
    """Whether a model's layers, run one by one over rows at any positions, are the model; tried on four tokens."""
    if not network.walks:
        return False
    ids = [0, 1, 2, 3]
    try:
        walk = Walk(network, ids, 0, np.ones(len(ids), bool), 1.0)
        for shape in shapes:
            empty = [
                mx.zeros((shape.heads, len(ids), dim), dtype) for dim in (shape.key_dim, shape.value_dim)
            ]
            walk.through(*empty)
        got, want = (
            network.finished(walk.hidden)[:, 0],
            network.finished(_whole(network, ids, len(shapes)))[0],
        )
        return bool((mx.abs(got - want).max() <= TOLERANCE * mx.abs(want).max()).item())
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        log.info("this model cannot be blended: %s", error)
        return False


def _whole(network: Network, ids: Sequence[int], layers: int) -> mx.array:
    hidden = network.embedded(mx.array([list(ids)], dtype=mx.int32))
    for number in range(layers):
        hidden = network.layer(number, hidden, None, mask="causal")
    return hidden


def selected(held: mx.array, fresh: mx.array, ratio: float, always: np.ndarray) -> np.ndarray:
    """Tokens to read anew, in order: those that are `always`, bool [n], and `ratio` of the others, by the squared deviation of
    their values.

    held, fresh [heads, n, dim] -> int [int(ratio * others) + always].
    """
    apart = ((fresh.astype(mx.float32) - held.astype(mx.float32)) ** 2).sum(axis=(0, 2))
    others = np.flatnonzero(~always)
    best = np.argsort(-np.array(apart)[others], kind="stable")[: int(ratio * len(others))]
    return np.sort(np.concatenate([others[best], np.flatnonzero(always)])).astype(np.int64)


def _tail(pieces: Sequence[Piece]) -> list[int]:
    """What stands behind the last slot; one token at least."""
    tail: list[int] = []
    for piece in reversed(pieces):
        if piece.slot is not None:
            break
        tail = [*piece.ids, *tail]
    return tail or [pieces[-1].ids[-1]]
