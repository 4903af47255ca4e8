"""The rows that stay, and how many of them a layer has."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from agentmem.episode.budgets import allotted, even
from agentmem.episode.selection import Heads, selected
from agentmem.episode.sensitivity import sensitivity
from tests.episode.state import World, text, world_of


@pytest.fixture(scope="module")
def world() -> World:
    return world_of()


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_every_head_keeps_its_own_best_in_their_order() -> None:
    got = selected([floats(0.1, 0.9, 0.3, 0.8), floats(0.7, 0.1, 0.2, 0.6)], 2)
    assert [c.tolist() for c in got] == [[1, 3], [0, 3]]


def test_ragged_heads_share_what_the_layer_has() -> None:
    got = selected([floats(0.1, 0.9, 0.3, 0.8), floats(0.2, 0.1, 0.7, 0.0)], 2, Heads.RAGGED)
    assert [c.tolist() for c in got] == [[1, 2, 3], [2]]


def test_of_equals_the_lowest_position_stays_and_then_the_first_head() -> None:
    equal = [floats(0.5, 0.5, 0.5), floats(0.5, 0.5, 0.5)]
    assert [c.tolist() for c in selected(equal, 1)] == [[0], [0]]
    assert [c.tolist() for c in selected(equal, 2)] == [[0, 1], [0, 1]]
    three = selected([*equal, floats(0.5, 0.5, 0.5)], 1, Heads.RAGGED)
    assert [c.tolist() for c in three] == [[0], [0], [0]]
    unequal = [floats(0.5, 0.5), floats(0.5)]
    assert [c.tolist() for c in selected(unequal, 1, Heads.RAGGED)] == [[0], [0]]


@pytest.mark.parametrize("heads", list(Heads))
def test_fewer_rows_than_a_budget_all_stay(heads: Heads) -> None:
    assert [c.tolist() for c in selected([floats(0.1, 0.2), floats(0.3, 0.0)], 5, heads)] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("unit", [1, 8])
def test_budgets_are_exactly_what_there_is_to_share(alpha: float, unit: int) -> None:
    draw = np.random.default_rng(3)
    for layers in (1, 3, 30):
        values = [0.0, *draw.random(layers - 1)]
        got = allotted(values, 256, alpha=alpha, unit=unit)
        assert sum(got) == layers * 256
        assert all(n % unit == 0 and n >= 64 for n in got)


def test_sensitive_layers_get_more_and_none_is_starved() -> None:
    got = allotted([0.0, 0.1, 0.2, 0.4], 100)
    assert got == sorted(got)
    assert got[0] == 25
    assert got[3] > 1.9 * got[2] - 1
    assert allotted([0.0, 0.0], 100) == even(2, 100)
    with pytest.raises(ValueError, match="units of 64"):
        allotted([1.0], 100, unit=64)


def test_sensitivity_is_that_of_a_block_mask(world: World) -> None:
    """Against one pass under the whole mask: no mask of all tokens is ever made otherwise."""
    ids, block, sinks = text(52), 16, 3
    shapes = [k.shape for k in world.kinds["whole"]]
    got = sensitivity(world.network, shapes, world.model.dtype, ids, block=block, sinks=sinks)
    at = np.arange(len(ids))
    near = at[None] >= (at[:, None] // block * block - block // 2)
    mask = (at[None] <= at[:, None]) & ((at[None] < sinks) | near)
    wanted = [1 - c for c in _cosines(world, ids, mx.array(mask))]
    assert got[0] == pytest.approx(0, abs=1e-6)
    assert got == pytest.approx(wanted, abs=1e-5)
    assert got[2] > 1e-3


class Masked:
    """A cache that notes keys under a mask."""

    offset = 0

    def __init__(self, mask: mx.array | None) -> None:
        self._mask = mask

    def make_mask(self, n: int, **_: object) -> str:
        return "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = keys
        return keys, values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, **options: object) -> mx.array:
        mask = "causal" if self._mask is None else self._mask
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=options["scale"], mask=mask)


def _cosines(world: World, ids: list[int], mask: mx.array) -> list[float]:
    seen = [[Masked(m) for _ in world.kinds["whole"]] for m in (None, mask)]
    for caches in seen:
        world.model.model(mx.array([ids]), cache=caches)
    out = []
    for a, b in zip(*seen, strict=True):
        size = mx.linalg.norm(a.keys, axis=-1) * mx.linalg.norm(b.keys, axis=-1)
        out.append(((a.keys * b.keys).sum(axis=-1) / size).mean().item())
    return out
