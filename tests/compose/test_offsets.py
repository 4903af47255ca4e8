"""Weights and offsets, against a transcription of the paper's formulas, and what must hold of any."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.compose.anchors import paper_gate
from agentmem.compose.offsets import Interpolation, Kriging, Observed, Paper, traits
from agentmem.compose.packed import PackedState, Samples
from agentmem.compose.state import State, above_first
from tests.compose.prompts import apart, states_apart

LAYERS, HEADS, DIM = 3, 2, 32
AFTER = 5
both = pytest.mark.parametrize("offsets", [Kriging(), Paper()], ids=["kriging", "paper"])


def drawn(n: int, seed: int, size: float = 1.0) -> State:
    rng = np.random.default_rng(seed)
    keys, values = (
        [mx.array(size * rng.standard_normal((HEADS, n, DIM)).astype(np.float32)) for _ in range(LAYERS)]
        for _ in range(2)
    )
    return State.of(keys, values)


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
    got_slot, got_after = Paper()(base, anchors)
    slot, after = transcribed(base, anchors, 1.0)
    for got, want in ((got_slot, slot), (got_after, after)):
        for part, expected in zip((got.keys, got.values), want, strict=True):
            np.testing.assert_allclose(np.array(mx.stack(part)), expected, atol=2e-6)


@both
def test_the_first_layer_has_no_offset(offsets: Interpolation) -> None:
    for state in offsets(drawn(4, 1), [anchor(6, 2), anchor(4, 3)]):
        assert not state.keys[0].any().item()
        assert not state.values[0].any().item()
        assert state.keys[1].any().item()
        assert state.values[1].any().item()


@both
@given(st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_anchors_does_not_matter(offsets: Interpolation, order: list[int]) -> None:
    """Invariant 11."""
    base, anchors = drawn(4, 1), [anchor(4 + i, 20 + i) for i in range(4)]
    for a, b in zip(offsets(base, anchors), offsets(base, [anchors[i] for i in order]), strict=True):
        assert states_apart(a, b) < 1e-4


@both
def test_weights_sum_to_one(offsets: Interpolation) -> None:
    """Invariant 11: an offset that all anchors share, token by token, is the offset, whatever they are like."""
    shared = State(mx.ones((1, drawn(1, 0).rows.shape[1])), drawn(1, 0).shapes)
    anchors = [
        Observed(drawn(6, 60 + i), State(mx.repeat(shared.rows, 6, axis=0), shared.shapes), shared)
        for i in range(3)
    ]
    for state in offsets(drawn(5, 1), anchors):
        for part in (*state.keys[1:], *state.values[1:]):
            assert apart(part, mx.ones_like(part)) < 1e-5


@both
def test_anchors_that_are_very_far_leave_finite_weights(offsets: Interpolation) -> None:
    base, anchors = drawn(4, 1), [anchor(4, 50 + i, size=1e3) for i in range(20)]
    for state in offsets(base, anchors):
        assert mx.isfinite(state.rows).all().item()
        assert state.rows.any().item()


def test_the_papers_only_anchor_is_the_offset() -> None:
    only = anchor(6, 2)
    slot, after = Paper()(drawn(4, 1), [only])
    deep = above_first(slot.shapes)
    assert apart(slot.rows, only.slot[:4].rows * deep) < 1e-6
    assert apart(after.rows, only.after.rows * deep) < 1e-6


def test_the_papers_weights_do_not_mind_that_every_anchor_is_there_twice() -> None:
    base, anchors = drawn(4, 1), [anchor(5, 30 + i) for i in range(3)]
    for a, b in zip(Paper()(base, anchors), Paper()(base, [*anchors, *anchors]), strict=True):
        assert states_apart(a, b) < 1e-5


def test_the_papers_low_temperature_takes_the_nearest_anchor() -> None:
    anchors = [anchor(5, 40 + i) for i in range(3)]
    base = anchors[1].base + drawn(5, 7, 0.01)
    slot, _ = Paper(tau=1e-4)(base, anchors)
    assert apart(slot.rows, anchors[1].slot.rows * above_first(slot.shapes)) < 1e-4


def weights(kriging: Kriging, text: State, anchors: list[State]) -> np.ndarray:
    others = [traits(a) for a in anchors]
    return np.array(kriging.weights(traits(text), kriging.gram([b""] * len(anchors), others)))


def test_kriging_finds_the_token_wherever_it_stands() -> None:
    """Tokens of the anchors in another order: each takes most of the offset of the one that is like it."""
    known = anchor(8, 2)
    order = [1, 0, 3, 2, 5, 4]
    text = State(known.base.rows[mx.array(order)], known.base.shapes)
    found = weights(Kriging(), text, [known.base, drawn(8, 3)])
    assert found[:, :8].argmax(axis=1).tolist() == order
    assert (found[np.arange(6), order] > 0.5).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_kriging_is_the_gaussian_process_that_it_says_it_is() -> None:
    text, anchors = drawn(3, 1), [drawn(4, 2), drawn(5, 3)]

    def vectors(state: State) -> np.ndarray:
        rows = np.stack([np.array(v, dtype=np.float64) for v in state.values]).transpose(2, 0, 1, 3)
        rows = rows.reshape(len(state), LAYERS, -1)
        rows = (rows / np.linalg.norm(rows, axis=2, keepdims=True)).reshape(len(state), -1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def alike(a: np.ndarray, at: int, b: np.ndarray, other: int) -> float:
        return math.exp(-np.linalg.norm(a - b) / 0.7 - abs(math.log((1 + at) / (1 + other))) / 3.0)

    known = [(v, t) for a in anchors for t, v in enumerate(vectors(a))]
    among = np.array([[alike(v, t, w, u) for w, u in known] for v, t in known])
    near = np.array([[alike(v, t, w, u) for w, u in known] for t, v in enumerate(vectors(text))])
    want = near @ np.linalg.inv(among + 0.2 * np.eye(9))
    want += (1 - want.sum(axis=1, keepdims=True)) / 9
    np.testing.assert_allclose(
        weights(Kriging(reach=0.7, span=3.0, noise=0.2), text, anchors), want, atol=2e-3
    )


def test_the_fixed_text_behind_goes_by_how_the_text_ends() -> None:
    """The anchor whose text ends alike gives its offset, wherever its end stands; without any such, each gives its part."""
    kriging, anchors = Kriging(noise=1e-6, reach=0.2), [anchor(n, 10 * n) for n in (4, 6, 9)]
    ends = anchors[1].base[5:6]
    text = State(mx.concatenate([drawn(11, 77).rows, ends.rows]), ends.shapes)
    _, after = kriging(text, anchors)
    deep = above_first(text.shapes)
    assert apart(after.rows, anchors[1].after.rows * deep) < 0.02
    same = [Observed(a.base, a.slot, anchors[0].after) for a in anchors]
    assert apart(kriging(drawn(5, 78), same)[1].rows, anchors[0].after.rows * deep) < 1e-5


@pytest.mark.parametrize("bits", [2, 8])
def test_samples_of_packed_states_are_their_rows(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = [PackedState.of(drawn(n, n), bits) for n in (9, 0, 5)]
    at = [np.array([1, 4, 8]), np.zeros(0, int), np.arange(5)]
    wanted = [p.unpacked().rows[mx.array(a)] for p, a in zip(packed, at, strict=True) if len(a)]
    for backend in ("cpu", "cuda"):
        monkeypatch.setattr("agentmem.compose.packed.backend", lambda name=backend: name)
        assert np.allclose(Samples.of(packed, at).rows(), mx.concatenate(wanted), atol=1e-7)
        assert len(Samples.of(packed)) == 14


@pytest.mark.parametrize("most", [1024, 9])
def test_packed_offsets_are_weighed_as_unpacked_ones(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, one anchor after the other, and as elsewhere, all at once; of all tokens, and of some."""
    kriging, base, anchors = Kriging(most=most), drawn(7, 1), [anchor(n, 10 + n) for n in (4, 6, 9)]
    packed = [(PackedState.of(a.slot, 2), PackedState.of(a.after, 2)) for a in anchors]
    seen = [Observed(a.base, *(p.unpacked() for p in pair)) for a, pair in zip(anchors, packed, strict=True)]
    others = [traits(a.base) for a in anchors]
    gram = kriging.gram([b""] * 3, others)
    assert sum(map(len, gram.at)) == (19 if most > 19 else 7)
    want = kriging(base, seen)
    for backend, at_once in (("cpu", 128), ("cpu", 12), ("cpu", 1), ("cuda", 128)):
        monkeypatch.setattr("agentmem.compose.packed.backend", lambda name=backend: name)
        monkeypatch.setattr("agentmem.compose.packed.AT_ONCE", at_once)
        slots, afters = zip(*packed, strict=True)
        assert states_apart(kriging.packed(base, Samples.of(slots, gram.at), gram), want[0]) < 1e-5
        assert states_apart(kriging.packed_after(base, Samples.of(afters), gram), want[1]) < 1e-5


def test_traits_keep_what_lies_near_and_what_lies_far() -> None:
    """Values of 768 numbers shortened to 512."""

    def wide(seed: int) -> State:
        draw = np.random.default_rng(seed).standard_normal((3, 4, 9, 64)).astype(np.float32)
        return State.of([mx.array(x) for x in draw], [mx.array(x) for x in draw])

    one, other = wide(1), wide(2)
    near = State(one.rows + 0.1 * other.rows, one.shapes)
    found = {name: traits(s) for name, s in (("one", one), ("near", near), ("far", other))}
    assert found["one"].rows.shape == (9, 512)
    np.testing.assert_allclose(mx.linalg.norm(found["near"].rows, axis=1), 1, atol=1e-5)
    gap = {k: np.array(mx.linalg.norm(found["one"].rows - found[k].rows, axis=1)) for k in ("near", "far")}
    assert (gap["near"] < 0.2).all()
    assert (abs(gap["far"] - math.sqrt(2)) < 0.25).all()
    assert traits(found["one"]) is found["one"]


def gate_of(distances: list[float], gamma: float) -> tuple[bool, tuple[int, ...]]:
    """The gate on a text of one token whose anchors lie at these distances."""

    def token(at: float) -> State:
        return State.of([mx.zeros((1, 1, DIM))], [mx.zeros((1, 1, DIM)).at[0, 0, 0].add(at)])

    gate = paper_gate(token(0.0), [token(d) for d in distances], gamma)
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
