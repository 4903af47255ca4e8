"""Weights and offsets, against a transcription of the paper's formulas, and what must hold of any."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.compose.anchors import paper_gate
from agentmem.compose.offsets import Observed, by_paper, by_relative_distance, relative_distances
from agentmem.compose.planners import Weigh
from agentmem.compose.state import State
from tests.compose.prompts import apart, states_apart

LAYERS, HEADS, DIM = 3, 2, 32
AFTER = 5
both = pytest.mark.parametrize("weigh", [by_relative_distance, by_paper])


def drawn(n: int, seed: int, size: float = 1.0) -> State:
    rng = np.random.default_rng(seed)
    parts = [
        tuple(mx.array(size * rng.standard_normal((HEADS, n, DIM)).astype(np.float32)) for _ in range(LAYERS))
        for _ in range(2)
    ]
    return State(parts[0], parts[1])


def anchor(n: int, seed: int, size: float = 1.0) -> Observed:
    return Observed(drawn(n, seed, size), drawn(n, seed + 1000, 0.2), drawn(AFTER, seed + 2000, 0.2))


def transcribed(
    base: State, anchors: list[Observed], tau: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The formulas of KVCOMM's code in NumPy, loops and all: offsets of the slot and of the text behind it, K then V."""

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(axis=0, keepdims=True))
        return e / e.sum(axis=0, keepdims=True)

    slot, after = [], []
    k = len(base)
    for part in ("keys", "values"):
        own = np.array(mx.stack(getattr(base, part)), dtype=np.float64)
        others = [np.array(mx.stack(getattr(a.base, part)), dtype=np.float64) for a in anchors]
        offsets = [np.array(mx.stack(getattr(a.slot, part)), dtype=np.float64) for a in anchors]
        behind = [np.array(mx.stack(getattr(a.after, part)), dtype=np.float64) for a in anchors]
        e = np.array([[np.abs(own[:, :, t] - o[:, :, t]).mean() for t in range(k)] for o in others])
        w = softmax(-e / tau)
        out = np.zeros_like(own)
        for number, offset in enumerate(offsets):
            for t in range(k):
                out[1:, :, t] += w[number, t] * offset[1:, :, t]
        slot.append(out)
        g = np.array([
            [[[np.linalg.norm(own[i, h, -k:, c] - o[i, h, -k:, c]) for c in range(DIM)] for h in range(HEADS)]
             for i in range(LAYERS)]
            for o in others
        ])  # fmt: skip
        u = softmax(-g / tau)
        out = np.zeros_like(behind[0])
        for number, offset in enumerate(behind):
            out[1:] += u[number][1:, :, None, :] * offset[1:]
        after.append(out)
    return slot, after


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_papers_weights_are_those_of_its_formulas(count: int) -> None:
    """Invariant 13, in the canonical frame."""
    base, anchors = drawn(7, 1), [anchor(7 + 2 * i, 10 + i) for i in range(count)]
    got_slot, got_after = by_paper(base, anchors)
    slot, after = transcribed(base, anchors, 1.0)
    for got, want in ((got_slot, slot), (got_after, after)):
        for part, expected in zip((got.keys, got.values), want, strict=True):
            np.testing.assert_allclose(np.array(mx.stack(part)), expected, atol=2e-6)


@both
def test_the_first_layer_has_no_offset(weigh: Weigh) -> None:
    for state in weigh(drawn(4, 1), [anchor(6, 2), anchor(4, 3)]):
        assert not state.keys[0].any().item()
        assert not state.values[0].any().item()
        assert state.keys[1].any().item()


@both
def test_one_anchor_is_the_offset(weigh: Weigh) -> None:
    only = anchor(6, 2)
    slot, after = weigh(drawn(4, 1), [only])
    for got, want in ((slot, only.slot[:4]), (after, only.after)):
        for x, y in zip((*got.keys[1:], *got.values[1:]), (*want.keys[1:], *want.values[1:]), strict=True):
            assert apart(x, y) < 1e-6


@both
@given(st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_anchors_does_not_matter(weigh: Weigh, order: list[int]) -> None:
    base, anchors = drawn(4, 1), [anchor(4 + i, 20 + i) for i in range(4)]
    for a, b in zip(weigh(base, anchors), weigh(base, [anchors[i] for i in order]), strict=True):
        assert states_apart(a, b) < 1e-5


@both
def test_every_anchor_twice_changes_nothing(weigh: Weigh) -> None:
    base, anchors = drawn(4, 1), [anchor(5, 30 + i) for i in range(3)]
    for a, b in zip(weigh(base, anchors), weigh(base, [*anchors, *anchors]), strict=True):
        assert states_apart(a, b) < 1e-5


@both
def test_a_low_temperature_takes_the_nearest_anchor(weigh: Weigh) -> None:
    anchors = [anchor(5, 40 + i) for i in range(3)]
    base = anchors[1].base + drawn(5, 7, 0.01)
    slot, _ = weigh(base, anchors, 1e-4)  # type: ignore[call-arg]
    for got, want in zip(slot.values[1:], anchors[1].slot.values[1:], strict=True):
        assert apart(got, want) < 1e-4


@both
def test_anchors_that_are_very_far_leave_finite_weights(weigh: Weigh) -> None:
    base, anchors = drawn(4, 1), [anchor(4, 50 + i, size=1e3) for i in range(20)]
    for state in weigh(base, anchors):
        assert all(mx.isfinite(x).all().item() for x in state.arrays)
        assert any(x.any().item() for x in state.arrays)


def test_distances_are_relative() -> None:
    base = drawn(6, 1)
    for size in (1.0, 100.0):
        own = [size * v for v in base.values]
        other = [size * v for v in drawn(9, 2).values]
        distances = relative_distances(own, [other, own])
        assert distances.shape == (2, 6)
        assert apart(distances[1], mx.zeros((6,))) < 1e-6
        assert (
            1.2 < distances[0].mean().item() < 1.6
        )  # two vectors of equal length that have nothing in common: root of 2


def gate_of(distances: list[float], gamma: float) -> tuple[bool, tuple[int, ...]]:
    """The gate on a text of one token whose anchors lie at these distances."""
    own = [mx.zeros((1, 1, DIM))]
    others = [[mx.zeros((1, 1, DIM)).at[0, 0, 0].add(d)] for d in distances]
    gate = paper_gate(own, others, gamma)
    return gate.shareable, gate.used


def test_the_papers_gate() -> None:
    assert gate_of([], 0.3) == (False, ())
    assert gate_of([1.0], 0.3) == (False, ()), "one anchor decides nothing"
    assert gate_of([1.0, 9.0, 9.0], 0.3) == (True, (0,)), "clearly the nearest"
    assert gate_of([5.0, 5.0, 5.0], 0.3) == (False, ()), "ambiguous"
    assert gate_of([5.0, 5.0, 5.0], 1.0) == (True, (0, 1, 2)), "which 1 never refuses"
    distances = [3.0, 4.0, 5.0]
    weights = [math.exp(-d) / sum(math.exp(-x) for x in distances) for d in distances]
    entropy = -sum(w * math.log2(w) for w in weights) / math.log2(3)
    assert gate_of(distances, entropy - 1e-3) == (False, ())
    assert gate_of(distances, entropy + 1e-3) == (True, (0, 1))
