"""Offsets out of anchors (KVCOMM, arXiv 2510.12872): what other texts of a slot went through when they were read in its place.

Everything is in the canonical frame: offsets do not depend on where the anchor's prompt had the slot. Layer 0 has none: its
keys and values are those of the token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import mlx.core as mx
import numpy as np

from agentmem.compose.packed import Samples
from agentmem.compose.state import State, above_first, key_width
from agentmem.quant.format import LayerShape

TRAITS = 512


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
class Gram:
    """What of a Gaussian process depends on the anchors of a slot alone.

    texts: which anchors, a of them. at: for each, the places of its tokens that count, all or some evenly spread. traits float32
    [m, width] and inverse float32 [m, m]: of these. ends float32 [a, width] and inverse_of_ends float32 [a, a]: of last tokens.
    """

    texts: tuple[bytes, ...]
    at: tuple[np.ndarray, ...]
    traits: mx.array
    inverse: mx.array
    ends: mx.array
    inverse_of_ends: mx.array

    @property
    def nbytes(self) -> int:
        arrays = (self.traits, self.inverse, self.ends, self.inverse_of_ends)
        return sum(a.nbytes for a in arrays) + sum(a.nbytes for a in self.at)


@dataclass(frozen=True, slots=True)
class Kriging:
    """Offsets of all tokens of all anchors, weighted by a Gaussian process over tokens.

    Those of the fixed text behind are weighted by one over the last tokens of the texts.

    Two tokens are alike as exp(-d / reach - p / span): d the distance of their traits; p the difference of the logarithms of
    their places in the text, since how much a token hears of what stands before the slot fades with its place. `noise` is
    what two tokens may differ by though alike. The rest goes to the mean. `most`: tokens of a slot's anchors that count.
    """

    reach: float = 1.0
    span: float = 4.0
    noise: float = 0.1
    most: int = 384

    @property
    def aligned(self) -> bool:
        return False

    def __call__(self, base: State, anchors: Sequence[Observed]) -> tuple[State, State]:
        gram = self.gram([b"" for _ in anchors], [traits(a.base) for a in anchors])
        weights = self.weights(traits(base), gram)
        deep = above_first(base.shapes)
        rows = [a.slot.rows[mx.array(at)] for a, at in zip(anchors, gram.at, strict=True)]
        after = self._after(base, mx.stack([a.after.rows for a in anchors]), gram)
        return State(weights @ mx.concatenate(rows) * deep, base.shapes), after

    def packed(self, base: State, slots: Samples, gram: Gram) -> State:
        """The slot's offsets out of the anchors' packed ones at the places that count."""
        weights = self.weights(traits(base), gram)
        return State(slots.weighed(weights) * above_first(base.shapes), base.shapes)

    def packed_after(self, base: State, afters: Samples, gram: Gram) -> State:
        """The same of the fixed text behind the slot, whose text is `base`."""
        anchors, n = len(afters.states), afters.counts[0]
        return self._after(base, afters.rows().reshape(anchors, n, -1), gram)

    def _after(self, base: State, afters: mx.array, gram: Gram) -> State:
        """afters float32 [a, n, width]."""
        end = traits(base[len(base) - 1 :]).rows
        weights = _to_one(self._near(end, gram.ends) @ gram.inverse_of_ends)
        found = (weights @ afters.reshape(len(afters), -1)).reshape(afters.shape[1:])
        return State(found * above_first(base.shapes), base.shapes)

    def gram(self, texts: Sequence[bytes], others: Sequence[State]) -> Gram:
        """others: the traits of the anchors."""
        total = sum(map(len, others))
        at = [
            np.arange(n)
            if total <= self.most
            else np.linspace(0, n - 1, min(n, max(1, n * self.most // total))).astype(int)
            for n in map(len, others)
        ]
        rows, places = (
            mx.concatenate([o.rows[mx.array(a)] for o, a in zip(others, at, strict=True)]),
            np.concatenate(at),
        )
        among = self._inverse(self._alike(rows, rows, places, places))
        ends = mx.concatenate([o.rows[-1:] for o in others])
        return Gram(tuple(texts), tuple(at), rows, among, ends, self._inverse(self._near(ends, ends)))

    def weights(self, text: State, gram: Gram) -> mx.array:
        """What each token of a text of n takes of the m tokens of the anchors that count: float32 [n, m]; rows sum to 1.

        text: its traits.
        """
        near = self._alike(text.rows, gram.traits, np.arange(len(text)), np.concatenate(gram.at))
        return _to_one(near @ gram.inverse)

    def _inverse(self, among: mx.array) -> mx.array:
        exact = np.array(among, dtype=np.float64)
        return mx.array(np.linalg.inv(exact + self.noise * np.eye(len(exact))).astype(np.float32))

    def _alike(self, a: mx.array, b: mx.array, at: np.ndarray, other: np.ndarray) -> mx.array:
        """Traits [n, width] and [m, width], their places -> float32 [n, m]."""
        places, others = (mx.log1p(mx.array(x.astype(np.float32))) for x in (at, other))
        apart = mx.abs(places[:, None] - others[None])
        return self._near(a, b) * mx.exp(-apart / self.span)

    def _near(self, a: mx.array, b: mx.array) -> mx.array:
        return mx.exp(-mx.sqrt(mx.maximum(2 - 2 * (a @ b.T), 0)) / self.reach)


def _to_one(weights: mx.array) -> mx.array:
    """Rows sum to 1: what is left goes to all alike."""
    return weights + (1 - weights.sum(axis=1, keepdims=True)) / weights.shape[1]


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


def traits(state: State) -> State:
    """What tokens are told apart by: the values of all layers, each of length 1, shortened to 512 numbers, of length 1 again.

    Those of a small model stay as they are. Traits are their own traits.
    """
    if state.shapes[0].key_dim == 0:
        return state
    n, widths = len(state), {s.heads * s.value_dim for s in state.shapes}
    values = state.rows[:, key_width(state.shapes) :]
    if len(widths) == 1:
        rows = _unit(values.reshape(n, len(state.shapes), -1)).reshape(n, -1)
    else:
        rows = mx.concatenate([_unit(v.transpose(1, 0, 2).reshape(n, -1)) for v in state.values], axis=1)
    if rows.shape[1] > TRAITS:
        pad = -rows.shape[1] % TRAITS
        rows = mx.pad(rows * _signs(rows.shape[1]), [(0, 0), (0, pad)]).reshape(n, -1, TRAITS).sum(axis=1)
    return State(_unit(rows), (LayerShape(1, 0, rows.shape[1]),))


def _unit(rows: mx.array) -> mx.array:
    return rows / mx.maximum(mx.linalg.norm(rows, axis=-1, keepdims=True), 1e-20)


@cache
def _signs(width: int) -> mx.array:
    """1 and -1, float32 [width], always the same: sums of what has them keep distances, about."""
    return mx.array(np.random.default_rng(0).choice([-1.0, 1.0], width).astype(np.float32))


def _mean_difference(base: Sequence[mx.array], anchor: Sequence[mx.array]) -> mx.array:
    """Mean absolute difference at each token, over layers, heads and dims: float32 [n]."""
    layers = [mx.abs(b - a).mean(axis=(0, 2)) for b, a in zip(base, anchor, strict=True)]
    return mx.stack(layers).mean(axis=0)
