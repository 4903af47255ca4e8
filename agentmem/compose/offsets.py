"""Offsets out of anchors (KVCOMM, arXiv 2510.12872): what other texts of a slot went through when they were read in its place.

Everything is in the canonical frame: offsets do not depend on where the anchor's prompt had the slot. Layer 0 has none: its
keys and values are those of the token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from agentmem.compose.state import State, above_first, key_width


@dataclass(frozen=True, slots=True)
class Observed:
    """One anchor, unpacked.

    base: its text alone. slot: what that text was in its place, less `base`. after: what the fixed text behind it was, less the
    fixed text's base.
    """

    base: State
    slot: State
    after: State


class Interpolation(Protocol):
    """Offsets of a slot whose text is `base` [n tokens], and of the fixed text behind it, out of one anchor or more.

    aligned: token t of the text takes the offsets of the anchors' tokens t, so that no anchor may be shorter than the text.
    """

    @property
    def aligned(self) -> bool: ...

    def __call__(self, base: State, anchors: Sequence[Observed]) -> tuple[State, State]: ...


@dataclass(frozen=True, slots=True)
class Kriging:
    """Offsets of all tokens of all anchors, weighted by a Gaussian process over tokens.

    Two tokens are alike as exp(-d / reach - p / span): d the distance of their values, all layers and heads as one vector of
    length 1; p the difference of the logarithms of their places in the text, since how much a token hears of what stands before
    the slot fades with its place. `noise` is what two tokens may differ by though alike. The rest goes to the mean.
    """

    reach: float = 1.0
    span: float = 2.0
    noise: float = 0.1

    @property
    def aligned(self) -> bool:
        return False

    def __call__(self, base: State, anchors: Sequence[Observed]) -> tuple[State, State]:
        weights = mx.array(self.weights(base, [a.base for a in anchors]))
        deep = above_first(base.shapes)
        slot = weights @ mx.concatenate([a.slot.rows for a in anchors])
        after = mx.stack([a.after.rows for a in anchors]).mean(axis=0)
        return State(slot * deep, base.shapes), State(after * deep, base.shapes)

    def weights(self, text: State, anchors: Sequence[State]) -> np.ndarray:
        """What each token of a text of n takes of all m tokens of the anchors: float32 [n, m]; rows sum to 1."""
        own, others = _directions(text), mx.concatenate([_directions(a) for a in anchors])
        places = np.concatenate([np.arange(len(a)) for a in anchors])
        near = self._alike(own, others, np.arange(len(text)), places)
        among = self._alike(others, others, places, places)
        found = np.linalg.solve(among + self.noise * np.eye(len(places)), near.T).T
        return (found + (1 - found.sum(axis=1, keepdims=True)) / len(places)).astype(np.float32)

    def _alike(self, a: mx.array, b: mx.array, at: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [n, width] and [m, width], their places -> float64 [n, m]."""
        distance = np.sqrt(np.maximum(2 - 2 * np.array(a @ b.T, dtype=np.float64), 0))
        apart = np.abs(np.log1p(at)[:, None] - np.log1p(other)[None])
        return np.exp(-distance / self.reach - apart / self.span)


@dataclass(frozen=True, slots=True)
class Paper:
    """The weights of the paper's code.

    Slot: at each token a softmax over anchors of the mean absolute difference over layers, heads and dims, of keys and of values
    apart. Fixed text behind: at each layer, head and channel a softmax of the norm of the difference over the last n tokens.
    """

    tau: float = 1.0

    @property
    def aligned(self) -> bool:
        return True

    def __call__(self, base: State, anchors: Sequence[Observed]) -> tuple[State, State]:
        deep = above_first(base.shapes)
        slot = State.of(self._slot("keys", base, anchors), self._slot("values", base, anchors))
        after = State.of(self._after("keys", base, anchors), self._after("values", base, anchors))
        return State(slot.rows * deep, base.shapes), State(after.rows * deep, base.shapes)

    def _slot(self, part: str, base: State, anchors: Sequence[Observed]) -> list[mx.array]:
        n, own = len(base), getattr(base, part)
        far = mx.stack([_mean_difference(own, getattr(a.base[:n], part)) for a in anchors])
        weights = mx.softmax(-far / self.tau, axis=0)[:, None, :, None]
        offsets = [getattr(a.slot[:n], part) for a in anchors]
        return [(mx.stack([o[layer] for o in offsets]) * weights).sum(axis=0) for layer in range(len(own))]

    def _after(self, part: str, base: State, anchors: Sequence[Observed]) -> list[mx.array]:
        n, out = len(base), []
        others = [getattr(a.base[len(a.base) - n :], part) for a in anchors]
        offsets = [getattr(a.after, part) for a in anchors]
        for layer, own in enumerate(getattr(base, part)):
            gaps = mx.stack([mx.sqrt(((own - o[layer]) ** 2).sum(axis=1)) for o in others])
            weights = mx.softmax(-gaps / self.tau, axis=0)[:, :, None, :]
            out.append((mx.stack([o[layer] for o in offsets]) * weights).sum(axis=0))
        return out


def _directions(state: State) -> mx.array:
    """The values of all layers of each token, as one vector of length 1: float32 [n, width]."""
    values = state.rows[:, key_width(state.shapes) :]
    return values / mx.maximum(mx.linalg.norm(values, axis=1, keepdims=True), 1e-20)


def _mean_difference(base: Sequence[mx.array], anchor: Sequence[mx.array]) -> mx.array:
    """Mean absolute difference at each token, over layers, heads and dims: float32 [n]."""
    layers = [mx.abs(b - a).mean(axis=(0, 2)) for b, a in zip(base, anchor, strict=True)]
    return mx.stack(layers).mean(axis=0)
