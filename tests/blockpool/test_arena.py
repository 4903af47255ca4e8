"""The arena gives back the rows that were put into its slots, and only those slots change."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from agentmem.blockpool.arena import HostArena, make_arena
from agentmem.blockpool.geometry import Geometry
from agentmem.quant.format import LayerShape
from tests.blockpool.layout import PAGE, geometry, packed_rows, raw_rows


@pytest.fixture
def g() -> Geometry:
    return geometry()


def filled(g: Geometry, slots: int = 12) -> HostArena:
    """An arena whose every word is set, so that a stray write or a missed one shows."""
    arena = HostArena(g, slots)
    for layer in range(g.layers):
        arena.view(layer)[:] = (
            np.arange(arena.view(layer).size, dtype=np.uint32).reshape(slots, -1) ^ 0xA5A5A5A5
        )
    return arena


def snapshot(arena: HostArena) -> list[np.ndarray]:
    return [arena.view(layer).copy() for layer in range(arena.geometry.layers)]


def untouched(before: list[np.ndarray], arena: HostArena, slots: set[int]) -> bool:
    others = [s for s in range(arena.slots) if s not in slots]
    return all(np.array_equal(b[others], arena.view(i)[others]) for i, b in enumerate(before))


def test_packed_rows_come_back_from_scattered_slots(g: Geometry) -> None:
    arena = filled(g)
    rows, before = packed_rows(g, 3 * PAGE), snapshot(arena)
    arena.write_packed([7, 2, 9], rows)
    for layer, want in enumerate(rows):
        assert mx.array_equal(arena.packed(layer, mx.array([7, 2, 9])), want).item()
        assert mx.array_equal(arena.packed(layer, mx.array([2])), want[PAGE : 2 * PAGE]).item()
    assert untouched(before, arena, {7, 2, 9})


def test_packed_rows_are_written_from_a_row_of_the_first_slot_on(g: Geometry) -> None:
    arena = filled(g)
    rows, before = packed_rows(g, PAGE), snapshot(arena)
    arena.write_packed([4, 1], rows, first_row=5)
    for layer, want in enumerate(rows):
        got = arena.packed(layer, mx.array([4, 1]))
        assert mx.array_equal(got[5 : 5 + PAGE], want).item()
        words = g.packed_words[layer]
        assert np.array_equal(np.array(got[:5]), before[layer][4].reshape(PAGE, words)[:5])
        assert np.array_equal(np.array(got[5 + PAGE :]), before[layer][1].reshape(PAGE, words)[5:])
    assert untouched(before, arena, {4, 1})


@pytest.mark.parametrize("n", [1, 4, 5, 13, PAGE])
def test_a_raw_page_lies_in_several_slots(g: Geometry, n: int) -> None:
    arena = filled(g)
    slots = [5, 0, 8, 3][: g.slots_for(True, n)]
    rows, before = raw_rows(g, n), snapshot(arena)
    arena.write_raw(slots, rows)
    for layer, want in enumerate(rows):
        assert mx.array_equal(arena.raw(layer, mx.array(slots), n), want).item()
        assert mx.array_equal(arena.raw(layer, mx.array(slots), 1), want[:1]).item()
    assert untouched(before, arena, set(slots))


def test_slots_of_a_raw_page_hold_all_of_it(g: Geometry) -> None:
    for rows in range(1, PAGE + 1):
        slots = g.slots_for(True, rows)
        assert slots * g.raw_per_slot >= rows > (slots - 1) * g.raw_per_slot
    assert g.slots_for(False, 1) == g.slots_for(False, PAGE) == 1
    assert g.slot_bytes == PAGE * g.packed_row_bytes
    assert g.packed_row_bytes / g.raw_row_bytes == 0.28125


def test_worst_slots_bounds_every_layout(g: Geometry) -> None:
    """Raw first page, packed pages, one page cut short, raw tail of any length."""
    for tokens in range(1, 5 * PAGE):
        first = g.slots_for(True, min(tokens, PAGE))
        tail = (tokens - PAGE) % PAGE if tokens > PAGE else 0
        packed = max(0, tokens - PAGE - tail) // PAGE
        cut = 1 if packed else 0
        assert first + packed + cut + (g.slots_for(True, tail) if tail else 0) <= g.worst_slots(tokens)


def test_collect_copies_rows_for_the_writer(g: Geometry) -> None:
    arena = filled(g)
    packed, raw = packed_rows(g, 2 * PAGE), raw_rows(g, 7)
    arena.write_packed([3, 6], packed)
    arena.write_raw([1, 10], raw)
    per = g.raw_per_slot
    take_packed = np.array([6 * PAGE + 2, 3 * PAGE + 15, 3 * PAGE])
    take_raw = np.array([10 * per + (6 - per), 1 * per])
    copy = arena.collect(take_packed, take_raw)
    out_packed, out_raw = copy()
    for layer in range(g.layers):
        assert np.array_equal(out_packed[layer], np.array(packed[layer])[[PAGE + 2, 15, 0]])
        assert np.array_equal(out_raw[layer], np.array(raw[layer])[[6, 0]])
    arena.view(0)[:] = 0
    assert out_packed[0].any(), "the copy is the arena itself"


def test_collect_of_nothing_is_empty(g: Geometry) -> None:
    out_packed, out_raw = filled(g).collect(np.zeros(0, np.int64), np.zeros(0, np.int64))()
    assert [a.shape for a in out_packed] == [(0, w) for w in g.packed_words]
    assert [a.shape for a in out_raw] == [(0, w) for w in g.raw_words]


def test_mlx_sees_what_a_host_thread_writes(g: Geometry) -> None:
    arena = filled(g)
    first = arena.packed(0, mx.array([0]))
    mx.eval(first)
    arena.view(0)[0] = 123456
    assert (np.array(arena.packed(0, mx.array([0]))) == 123456).all()


def test_arena_has_as_many_slots_as_the_budget_pays_for() -> None:
    g = geometry()
    assert make_arena(g, 20 * g.slot_bytes + 1).slots == 20
    least = 1 + 2 * g.slots_for(True, PAGE)
    assert make_arena(g, least * g.slot_bytes).slots == least
    with pytest.raises(ValueError, match=f"holds {least - 1} KV slots.*at least {least}"):
        make_arena(g, least * g.slot_bytes - 1)


def test_formats_without_packing_keep_a_raw_page_in_one_slot() -> None:
    g = geometry(LayerShape(2, 64, 64), name="fp16")
    assert g.raw_per_slot == PAGE
    assert g.slots_for(True, PAGE) == 1
    arena = filled(g, 4)
    rows = raw_rows(g, PAGE)
    arena.write_raw([2], rows)
    assert mx.array_equal(arena.raw(0, mx.array([2]), PAGE), rows[0]).item()
    assert mx.array_equal(arena.packed(0, mx.array([2])), rows[0]).item()
