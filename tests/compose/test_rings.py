"""Invariant 25: slots longer than a window, over mlx-lm's own caches, whose local layers are rings.

A daemon does not compose such models: of their windows it keeps the ends of turns alone, and the lines of its prompts know none.
That the state of such a model can be captured, moved and gone on from all the same is shown here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from agentmem.compose import planners
from agentmem.compose.planners import Put, Read
from agentmem.compose.prompt import Prompt
from agentmem.compose.rotation import rotations
from agentmem.compose.state import State
from agentmem.model import seam
from agentmem.model.network import Network
from tests.compose.prompts import PATTERN, WINDOW, apart, states_apart, windowed_model
from tests.compose.test_invariants import IDS, TAIL, Placed

CARRIER, FRONT = [9, 8, 7], list(range(40, 51))
SLOT = len(FRONT), len(FRONT) + len(IDS)
RINGS = [layer for layer in range(PATTERN + 1) if layer != PATTERN - 1]


class Ring:
    """A layer's cache of mlx-lm, and beside it every row that went in: of a ring, most are gone when a slot has been read."""

    def __init__(self, cache: KVCache | RotatingKVCache) -> None:
        self.cache = cache
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> int:
        return self.cache.offset

    def make_mask(self, *args: Any, **options: Any) -> Any:
        return self.cache.make_mask(*args, **options)

    def append(self, keys: mx.array, values: mx.array) -> None:
        self.update_and_fetch(keys[None], values[None])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        past = () if self.keys is None else (self.keys,)
        past_values = () if self.values is None else (self.values,)
        self.keys = mx.concatenate([*past, keys[0]], axis=1)
        self.values = mx.concatenate([*past_values, values[0]], axis=1)
        return self.cache.update_and_fetch(keys, values)

    @property
    def window(self) -> tuple[mx.array, mx.array]:
        """Keys and values of the window's tokens, in their order: [heads, WINDOW, dim]."""
        ordered = (self.cache._temporal_order(x) for x in (self.cache.keys, self.cache.values))
        keys, values = (x[0, :, -WINDOW:] for x in ordered)
        return keys, values


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found = windowed_model()
    seam.install(found)
    return found


def over_rings(model: nn.Module) -> Prompt:
    prompt = Prompt(Network(model), rotations(model), mx.float32)
    prompt.lines = [Ring(cache) for cache in model.make_cache()]
    assert [n for n, line in enumerate(prompt.lines) if isinstance(line.cache, RotatingKVCache)] == RINGS
    return prompt


def captured(model: nn.Module, context: Sequence[int], size: int) -> State:
    """`IDS` behind a context, read in parts of `size` tokens."""
    prompt, ids = over_rings(model), [*context, *IDS]
    for at in range(0, len(ids), size):
        prompt.read(ids[at : at + size])
    assert all(prompt.lines[layer].cache.keys.shape[2] < WINDOW + size < len(IDS) for layer in RINGS)
    return prompt.state(len(context), len(ids))


@pytest.mark.parametrize("size", [1, 7])
def test_a_slot_is_captured_from_rings_as_from_whole_caches(model: nn.Module, size: int) -> None:
    """A prompt's own lines, without windows, capture another state in all layers but the first."""
    ids, whole = [*CARRIER, *IDS], [Placed() for _ in model.layers]
    mx.eval(model(mx.array([ids]), cache=whole))
    reference = Prompt(Network(model), rotations(model), mx.float32)
    for line, by in zip(reference.lines, whole, strict=True):
        assert by.keys is not None
        assert by.values is not None
        line.append(by.keys[0], by.values[0])
    want = reference.state(len(CARRIER), len(ids))
    assert states_apart(captured(model, CARRIER, size), want) < 1e-3
    unwindowed = Prompt(Network(model), rotations(model), mx.float32)
    unwindowed.read(ids)
    found = unwindowed.state(len(CARRIER), len(ids))
    off = [apart(a, b) > 1e-2 for a, b in zip(found.values, want.values, strict=True)]
    assert off == [False, *[True] * PATTERN]


def alike(a: Prompt, b: Prompt) -> bool:
    """Whether the rings of two prompts have the same windows at the same place of the text."""
    pairs = [(a.lines[layer], b.lines[layer]) for layer in RINGS]
    return all(
        x.offset == y.offset and all(apart(p, q) < 1e-3 for p, q in zip(x.window, y.window, strict=True))
        for x, y in pairs
    )


def at(prompt: Prompt) -> list[int]:
    """Where each ring writes next."""
    return [prompt.lines[layer].cache._idx for layer in RINGS]


@pytest.mark.parametrize("tail", [TAIL, TAIL[:1]])
def test_rings_of_a_composed_prompt_turn_as_those_of_a_dense_one(model: nn.Module, tail: list[int]) -> None:
    """By an anchor of itself; and on, through a reply of two windows. Without what it was set off by it is another prompt."""
    dense, done = over_rings(model), over_rings(model)
    dense.read(FRONT + IDS)
    base, there = captured(model, CARRIER, 1), dense.state(*SLOT)
    want = dense.read(tail)
    text = Put(tuple(FRONT), dense.state(0, len(FRONT)))
    got = planners.run(done, [text, Put(tuple(IDS), base + (there - base)), Read(tuple(tail))])
    moved = over_rings(model)
    off = planners.run(moved, [text, Put(tuple(IDS), base), Read(tuple(tail))])
    assert apart(off, want) > 1e-2
    assert not alike(moved, dense)
    for _ in range(2 * WINDOW):
        assert apart(got, want) < 1e-3
        assert alike(done, dense)
        assert at(done) == at(dense)
        token = int(want.argmax().item())
        want, got = dense.read([token]), done.read([token])
    assert done.read_tokens == len(tail) + 2 * WINDOW


def test_where_a_ring_writes_depends_on_passes_and_its_window_does_not(model: nn.Module) -> None:
    """A prompt that is read at once, and one that was put and whose last token was read: the same windows, otherwise turned."""
    ids = FRONT + IDS
    dense, done = over_rings(model), over_rings(model)
    want = dense.read(ids)
    steps = [Put(tuple(ids[:-1]), dense.state(0, len(ids) - 1)), Read(tuple(ids[-1:]))]
    got = planners.run(done, steps)
    for _ in range(2 * WINDOW):
        assert apart(got, want) < 1e-3
        assert alike(done, dense)
        assert at(done) != at(dense)
        token = int(want.argmax().item())
        want, got = dense.read([token]), done.read([token])
