"""Offsets out of anchors (KVCOMM, arXiv 2510.12872): what other texts of a slot went through when they were read in its place.

Everything is in the canonical frame: offsets do not depend on where the anchor's prompt had the slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from agentmem.compose.state import State

TAU = 0.1
"""Temperature of relative distances."""
PAPER_TAU = 1.0


@dataclass(frozen=True, slots=True)
class Observed:
    """One anchor, unpacked, cut to the tokens of the slot that is composed.

    base: its text alone, as long as the slot at least. slot: what that text was in its place, less `base`. after: what the fixed
    text behind it was, less the fixed text's base.
    """

    base: State
    slot: State
    after: State


def relative_distances(values: Sequence[mx.array], anchors: Sequence[Sequence[mx.array]]) -> mx.array:
    """Distance of each anchor at each token, over the values of all layers and heads, against the text's own size.

    values: float32 [heads, n, dim] per layer; anchors alike, n tokens or more -> float32 [anchors, n]. Two unrelated texts are
    about 1.4 apart; the same text 0.
    """
    apart = mx.stack([squares_apart(values, anchor) for anchor in anchors])
    own = squares_apart(values, [mx.zeros_like(v) for v in values])
    return mx.sqrt(apart / mx.maximum(own, 1e-20))


def squares_apart(values: Sequence[mx.array], others: Sequence[mx.array]) -> mx.array:
    """Sum over layers, heads and dims of the squared difference at each token: [heads, n, dim] per layer -> float32 [n]."""
    n = values[0].shape[1]
    layers = [((v - o[:, :n]) ** 2).sum(axis=(0, 2)) for v, o in zip(values, others, strict=True)]
    return mx.stack(layers).sum(axis=0)


def by_relative_distance(base: State, anchors: Sequence[Observed], tau: float = TAU) -> tuple[State, State]:
    """Offsets of the slot and of the fixed text behind it, each token by how close the anchors' tokens are there.

    The fixed text behind follows the mean distance. Layer 0 has none: its keys and values are those of the token alone.
    """
    distances = relative_distances(base.values, [a.base.values for a in anchors])
    weights = mx.softmax(-distances / tau, axis=0)
    after = mx.softmax(-distances.mean(axis=1) / tau, axis=0)
    n = len(base)
    slot = _mixed([a.slot[:n] for a in anchors], weights[:, None, :, None])
    return slot, _mixed([a.after for a in anchors], after[:, None, None, None])


def by_paper(base: State, anchors: Sequence[Observed], tau: float = PAPER_TAU) -> tuple[State, State]:
    """The same with the weights of the paper's code.

    Slot: per token, softmax of the mean absolute difference over layers, heads and dims; keys and values apart. Fixed text: per
    layer, head and channel, softmax of the norm of the difference over the text's last n tokens.
    """
    n = len(base)
    slot = State(*(
        _weighted(
            [getattr(a.slot[:n], part) for a in anchors],
            mx.softmax(
                -mx.stack([_mean_difference(getattr(base, part), getattr(a.base, part)) for a in anchors]) / tau,
                axis=0,
            )[:, None, :, None],
        )
        for part in ("keys", "values")
    ))  # fmt: skip
    after = State(*(
        _by_channel(
            getattr(base, part),
            [getattr(a.base, part) for a in anchors],
            [getattr(a.after, part) for a in anchors],
            tau,
        )
        for part in ("keys", "values")
    ))  # fmt: skip
    return slot, after


def _mean_difference(base: Sequence[mx.array], anchor: Sequence[mx.array]) -> mx.array:
    """Mean absolute difference at each token, over layers, heads and dims: float32 [n]."""
    n = base[0].shape[1]
    return mx.stack([mx.abs(b - a[:, :n]).mean(axis=(0, 2)) for b, a in zip(base, anchor, strict=True)]).mean(
        axis=0
    )


def _by_channel(
    base: Sequence[mx.array],
    anchors: Sequence[Sequence[mx.array]],
    offsets: Sequence[Sequence[mx.array]],
    tau: float,
) -> tuple[mx.array, ...]:
    n = base[0].shape[1]
    out = []
    for layer, own in enumerate(base):
        gaps = mx.stack([mx.sqrt(((own - a[layer][:, -n:]) ** 2).sum(axis=1)) for a in anchors])
        weights = mx.softmax(-gaps / tau, axis=0)[:, :, None, :]
        stacked = mx.stack([o[layer] for o in offsets])
        out.append((stacked * weights).sum(axis=0) if layer else mx.zeros_like(stacked[0]))
    return tuple(out)


def _mixed(states: Sequence[State], weights: mx.array) -> State:
    return State(_weighted([s.keys for s in states], weights), _weighted([s.values for s in states], weights))


def _weighted(arrays: Sequence[Sequence[mx.array]], weights: mx.array) -> tuple[mx.array, ...]:
    """Sum over the first axis of weights, which broadcast to [anchors, heads, n, dim]; nothing in layer 0."""
    layers = []
    for layer in range(len(arrays[0])):
        stacked = mx.stack([a[layer] for a in arrays])
        layers.append((stacked * weights).sum(axis=0) if layer else mx.zeros_like(stacked[0]))
    return tuple(layers)
