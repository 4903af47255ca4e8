"""Views are row ids over rows that never change: switching loses nothing, and what was just said is seen by all of them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from agentmem.bench.held import held as held_table
from agentmem.engine.layout import layout
from agentmem.engine.views import History
from agentmem.episode.fold import folded, viewed
from agentmem.episode.held import Held
from agentmem.episode.line import Line
from agentmem.episode.passes import Pass
from agentmem.episode.rows import LayerKind, kinds_of
from agentmem.episode.selection import Heads
from agentmem.episode.store import MemoryStore, Page, PageStore
from agentmem.episode.views import View, materialised, store_scores, view_of
from tests.episode.live import Live
from tests.episode.state import BOTH, World, same, text, world_of

SEEN = text(100)
PROMPTS = [text(14, seed=n) for n in (1, 2)]
SAID = text(20, seed=5)
ASK = text(8, seed=6)
BUDGETS = [22, 24, 26]


@pytest.fixture(scope="module")
def world() -> World:
    return world_of()


def views(world: World, format: str = "whole", heads: Heads = Heads.RAGGED) -> Live:
    store = world.store(SEEN, format)
    made = {
        n: view_of(store, store_scores(world.network, store, p), BUDGETS, heads)
        for n, p in enumerate(PROMPTS)
    }
    return Live(world.network, store, made, world.model.dtype, BUDGETS, block=16, active=0, heads=heads)


def held_by(live: Live, world: World, view: View) -> Held:
    return materialised(world.network, live.store, view, world.model.dtype)


@pytest.mark.parametrize("heads", BOTH)
@pytest.mark.parametrize("format", ["whole", "q4-plain"])
def test_a_view_is_the_full_cache_evicted(world: World, format: str, heads: Heads) -> None:
    full = world.read(SEEN, format)
    full.evict(full.score(PROMPTS[0]), BUDGETS, heads)
    live = views(world, format, heads)
    assert same(live.held, full)
    assert View.of(full).tokens == live.views[0].tokens
    assert live.held.most_rows() == BUDGETS
    assert all(np.array_equal(a, b) for a, b in zip(View.of(full).ids, live.views[0].ids, strict=True))


class Disk:
    """A store whose layers are files, read when they are asked for."""

    def __init__(self, folder: Path, held: Held) -> None:
        self.kinds: list[LayerKind] = [line.kind for line in held.lines]
        self.sinks, self.tokens, self.folder = held.sinks, held.tokens, folder
        self.opened: list[int] = []
        for layer, line in enumerate(held.lines):
            mx.save_safetensors(str(folder / f"{layer}"), {"lead": line.lead, "rows": line.tail})

    def _file(self, layer: int) -> dict[str, mx.array]:
        self.opened.append(layer)
        return mx.load(str(self.folder / f"{layer}.safetensors"))

    def lead(self, layer: int) -> mx.array:
        return self._file(layer)["lead"]

    def rows(self, layer: int, start: int, stop: int) -> mx.array:
        return self._file(layer)["rows"][:, start - self.sinks : stop - self.sinks]


def test_a_store_is_read_one_layer_after_the_other(world: World, tmp_path: Path) -> None:
    disk, memory = Disk(tmp_path, world.read(SEEN, "q4-plain")), world.store(SEEN, "q4-plain")
    from_disk = store_scores(world.network, disk, PROMPTS[0])
    assert disk.opened == sorted(disk.opened)
    for x, y in zip(from_disk, store_scores(world.network, memory, PROMPTS[0]), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(x, y, strict=True))
    view = view_of(disk, from_disk, BUDGETS)
    assert same(
        materialised(world.network, disk, view, world.model.dtype),
        materialised(world.network, memory, view, world.model.dtype),
    )


@pytest.mark.parametrize("format", ["whole", "q4-plain"])
def test_away_and_back_is_the_same_bit_for_bit(world: World, format: str) -> None:
    live = views(world, format)
    live.held.absorb(SAID)
    before, wanted = live.held, live.held.predictions([ASK])
    live.switch(1)
    assert not same(live.held, before)
    live.switch(0)
    assert same(live.held, before)
    assert mx.array_equal(live.held.predictions([ASK]), wanted)


def test_the_same_episode_costs_nothing(world: World) -> None:
    live = views(world)
    held = live.held
    live.switch(0)
    assert live.held is held


def rows_of(line: Line, start: int, stop: int) -> bool:
    """Whether every head has all rows of tokens `start` to `stop`."""
    return all(set(range(start, stop)) <= set(p.tolist()) for p in line.candidate_positions())


@pytest.mark.parametrize("stored", [False, True])
def test_what_was_just_said_is_seen_by_every_view(world: World, stored: bool) -> None:
    live = views(world)
    live.held.absorb(SAID)
    rows = [mx.array(line.tail) for line in live.held.lines]
    if stored:
        live.store_tail()
        assert (live.store.tokens, live.tail) == (120, 0)
    live.switch(1)
    assert live.held.tokens == 120
    for line, want in zip(live.held.lines, rows, strict=True):
        assert rows_of(line, 100, 120)
        assert mx.array_equal(line.tail, want)
    more = live.held.copy()
    more.absorb(ASK)
    live.held.absorb(ASK)
    live.switch(0)
    assert live.held.tokens == 128
    assert all(rows_of(line, 100, 128) for line in live.held.lines)


@pytest.mark.parametrize("heads", BOTH)
def test_a_fold_lets_new_rows_compete(world: World, heads: Heads) -> None:
    """One prompt over {view, tail}: the same as evicting what is held."""
    live = views(world, "q4-plain", heads)
    live.held.absorb(SAID[:10])
    wanted = live.held.copy()
    wanted.evict(wanted.score(PROMPTS[0]), BUDGETS, heads)
    live.fold(0, PROMPTS[0])
    assert same(live.held, wanted)
    assert live.views[0].tokens == live.store.tokens == 110
    assert live.held.most_rows() == BUDGETS
    assert live.views[1].tokens == 100
    assert (live.behind(0), live.behind(1)) == (0, 10)
    live.switch(1)
    assert all(rows_of(line, 100, 110) for line in live.held.lines)


def test_a_late_fold_goes_block_by_block(world: World) -> None:
    live = views(world)
    live.held.absorb(SAID)
    live.fold(0, PROMPTS[0])
    late = folded(
        world.network,
        live.store,
        live.views[1],
        PROMPTS[1],
        BUDGETS,
        world.model.dtype,
        block=16,
        heads=Heads.RAGGED,
    )
    step = live.views[1]
    for upto in (116, 120):
        held = materialised(world.network, live.store, step, world.model.dtype, upto)
        assert max(held.most_rows()) <= max(BUDGETS) + 16
        held.evict(held.score(PROMPTS[1]), BUDGETS, Heads.RAGGED)
        step = View.of(held)
    assert all(np.array_equal(a, b) for a, b in zip(late.ids, step.ids, strict=True))
    assert any((ids >= 100).any() for ids in late.ids)


@pytest.mark.parametrize("heads", BOTH)
def test_a_view_made_block_by_block_holds_a_budget_and_a_block(world: World, heads: Heads) -> None:
    store = world.store(SEEN)
    got = viewed(world.network, store, PROMPTS[0], BUDGETS, world.model.dtype, block=16, heads=heads)
    held = world.held()
    step = View.of(held)
    assert step.tokens == 0
    for upto in (*range(20, 100, 16), 100):
        start = View(step.ids, step.counts, max(step.tokens, 4))
        held = materialised(world.network, store, start, world.model.dtype, upto)
        assert all(n <= b + 16 for n, b in zip(held.most_rows(), BUDGETS, strict=True))
        held.evict(held.score(PROMPTS[0]), BUDGETS, heads)
        step = View.of(held)
    assert got.tokens == step.tokens == 100
    assert all(np.array_equal(a, b) for a, b in zip(got.ids, step.ids, strict=True))
    assert held.most_rows() == BUDGETS


def test_views_survive_as_plain_arrays(world: World) -> None:
    live = views(world)
    for view in live.views.values():
        arrays, meta = view.arrays()
        assert all(a.dtype == np.int32 for a in arrays.values())
        again = View.of_arrays(arrays, json.loads(json.dumps(meta)))
        assert same(held_by(live, world, view), held_by(live, world, again))


def test_a_view_of_everything_is_the_store(world: World) -> None:
    store = world.store(SEEN)
    every = view_of(store, store_scores(world.network, store, PROMPTS[0]), [len(SEEN) + 5] * 3)
    held = materialised(world.network, store, every, world.model.dtype)
    assert mx.array_equal(held.predictions([ASK]), world.read(SEEN).predictions([ASK]))


@pytest.mark.parametrize("format", ["q4-plain", "q4-rotated", "fp16"])
def test_rows_of_the_engines_pages_are_a_store(world: World, format: str) -> None:
    """A raw first page, packed pages and a raw tail: the rows that reading them as one cache makes."""
    plan = layout(world.model, format, 32)
    kinds = kinds_of(plan.geometry.codecs, plan.geometry.key_maps)
    wanted = Held.empty(world.network, kinds, world.model.dtype)
    passes = [Pass(lambda line=line: line, 0) for line in world.held().lines]
    world.network.logits(mx.array([SEEN]), passes, [])
    table = held_table(plan, SEEN, [(p.keys[0], p.values[0]) for p in passes], len(SEEN))
    history = History(table)
    for line, seen in zip(wanted.lines, passes, strict=True):
        line.append(line.kind.key_map.keys(seen.keys)[0], seen.values[0], 4)
    wanted.tokens = len(SEEN)

    def pages(layer: int) -> list[Page]:
        *raw, tail = [Page(words, True) for words in history.raw_blocks(layer)]
        packed = history.packed_rows(layer)
        return [*raw, *([] if packed is None else [Page(packed, False)]), tail]

    store = PageStore(plan.geometry.codecs, plan.geometry.key_maps, pages, len(SEEN), 4)
    memory = MemoryStore(wanted)
    for layer in range(3):
        assert mx.array_equal(store.lead(layer), memory.lead(layer))
        for start, stop in ((4, 100), (20, 70), (97, 100), (50, 50)):
            assert mx.array_equal(store.rows(layer, start, stop), memory.rows(layer, start, stop))
    view = view_of(store, store_scores(world.network, store, PROMPTS[0]), BUDGETS)
    assert same(*(materialised(world.network, s, view, world.model.dtype) for s in (store, memory)))
    table.release()
