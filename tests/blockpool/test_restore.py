"""Restore plans: which rows of which extents go where, in as few reads as possible."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from agentmem.blockpool.extent import write_extent
from agentmem.blockpool.files import Files
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.restore import Reader, RestorePlan, Run
from tests.blockpool.layout import PAGE, extent_data, geometry


@pytest.fixture
def g() -> Geometry:
    return geometry()


def page(rows: int, raw: bool, *pieces: Piece) -> Page:
    return Page(None, np.arange(rows), b"", raw, pieces=pieces)


def packed_pages(*slots: int, extent: int = 1) -> list[tuple[Page, tuple[int, ...]]]:
    return [(page(PAGE, False, Piece(extent, False, i * PAGE, 0, PAGE)), (s,)) for i, s in enumerate(slots)]


def test_pages_that_follow_each_other_are_one_run(g: Geometry) -> None:
    plan = RestorePlan(g, packed_pages(3, 4, 5))
    assert plan.runs == {(1, False): [Run(0, 3 * PAGE, "packed", 3 * PAGE)]}
    assert plan.bytes == 3 * PAGE * g.packed_row_bytes


def test_pages_apart_in_memory_or_on_disk_are_runs_of_their_own(g: Geometry) -> None:
    assert len(RestorePlan(g, packed_pages(3, 5, 6)).runs[1, False]) == 2
    assert len(RestorePlan(g, packed_pages(5, 4, 3)).runs[1, False]) == 3
    gap = [packed_pages(3, 4, 5)[0], packed_pages(3, 4, 5)[2]]
    assert RestorePlan(g, gap).runs[1, False] == [
        Run(0, PAGE, "packed", 3 * PAGE),
        Run(2 * PAGE, PAGE, "packed", 5 * PAGE),
    ]


def test_runs_are_in_the_order_of_the_file(g: Geometry) -> None:
    pages = packed_pages(1, 3, 5)[::-1]
    assert [r.extent_row for r in RestorePlan(g, pages).runs[1, False]] == [0, PAGE, 2 * PAGE]


def test_a_raw_page_is_split_at_its_slots(g: Geometry) -> None:
    per = g.raw_per_slot
    assert per == 4
    plan = RestorePlan(g, [(page(11, True, Piece(1, True, 5, 0, 11)), (7, 8, 2))])
    assert plan.runs == {(1, True): [Run(5, 4, "raw", 0, 7), Run(9, 4, "raw", 0, 8), Run(13, 3, "raw", 0, 2)]}
    assert plan.bytes == 11 * g.raw_row_bytes


def test_raw_pieces_of_a_raw_page_meet_within_a_slot(g: Geometry) -> None:
    plan = RestorePlan(g, [(page(8, True, Piece(1, True, 0, 0, 3), Piece(2, True, 9, 3, 5)), (7, 8))])
    assert plan.runs == {
        (1, True): [Run(0, 3, "raw", 0, 7)],
        (2, True): [Run(9, 1, "raw", 3, 7), Run(10, 4, "raw", 0, 8)],
    }


def test_rows_that_lie_raw_on_disk_are_packed_again(g: Geometry) -> None:
    pieces = Piece(1, True, 2, 0, 5), Piece(2, False, 0, 5, PAGE - 5)
    plan = RestorePlan(g, [(page(PAGE, False, *pieces), (6,))])
    assert plan.runs == {
        (1, True): [Run(2, 5, "scratch", 0)],
        (2, False): [Run(0, PAGE - 5, "packed", 6 * PAGE + 5)],
    }
    assert plan.repack == [((6,), 0, 0, 5)]
    assert plan.scratch_rows == 5


def test_scratch_rows_of_several_pages_do_not_overlap(g: Geometry) -> None:
    pages: list[tuple[Page, tuple[int, ...]]] = [
        (page(5, False, Piece(1, True, 10 * i, 0, 5)), (i,)) for i in range(3)
    ]
    plan = RestorePlan(g, pages)
    assert [(r.extent_row, r.at) for r in plan.runs[1, True]] == [(0, 0), (10, 5), (20, 10)]
    assert plan.scratch_rows == 15


def test_raw_rows_packed_after_the_read_have_the_bits_of_the_first_time(tmp_path: Path, g: Geometry) -> None:
    name, _ = write_extent(tmp_path, data := extent_data(g, 0, 9), Files())
    plan = RestorePlan(g, [(page(5, False, Piece(1, True, 3, 0, 5)), (2,))])
    with closing(Reader(tmp_path, threads=1)) as reader:
        scratch, bad = reader.read(plan, {1: name}, [np.zeros((4, w), np.uint32) for w in g.slot_words])
    assert not bad
    for codec, rows, read in zip(g.codecs, data.raw, scratch, strict=True):
        assert np.array_equal(read, rows[3:8])
        once = np.array(codec.pack(mx.array(rows)))[3:8]
        assert np.array_equal(np.array(codec.pack(mx.array(read))), once)


def test_only_the_wanted_rows_are_written(tmp_path: Path, g: Geometry) -> None:
    """Rows of a cut page: the slot's other rows, and every other slot, stay as they are."""
    name, _ = write_extent(tmp_path, data := extent_data(g, 3 * PAGE, 0), Files())
    plan = RestorePlan(g, [(page(7, False, Piece(1, False, PAGE + 2, 0, 7)), (1,))])
    views = [np.full((3, w), 0xDEAD, np.uint32) for w in g.slot_words]
    with closing(Reader(tmp_path, threads=2)) as reader:
        _, bad = reader.read(plan, {1: name}, views)
    assert not bad
    for layer, view in enumerate(views):
        rows = view.reshape(3 * PAGE, -1)
        assert np.array_equal(rows[PAGE : PAGE + 7], data.packed[layer][PAGE + 2 : PAGE + 9])
        assert (rows[:PAGE] == 0xDEAD).all()
        assert (rows[PAGE + 7 :] == 0xDEAD).all()


def test_without_views_the_bytes_are_still_checked(tmp_path: Path, g: Geometry) -> None:
    name, _ = write_extent(tmp_path, extent_data(g, PAGE, 6), Files())
    pages: list[tuple[Page, tuple[int, ...]]] = [
        *packed_pages(0),
        (page(6, True, Piece(1, True, 0, 0, 6)), (1, 2)),
    ]
    with closing(Reader(tmp_path, threads=2)) as reader:
        assert reader.read(RestorePlan(g, pages), {1: name}, None)[1] == {}
        content = bytearray((tmp_path / name).read_bytes())
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
        assert "raw.1" in reader.read(RestorePlan(g, pages), {1: name}, None)[1][1]


def test_rows_beyond_the_extent_are_refused(tmp_path: Path, g: Geometry) -> None:
    name, _ = write_extent(tmp_path, extent_data(g, PAGE, 0), Files())
    views = [np.zeros((4, w), np.uint32) for w in g.slot_words]
    with closing(Reader(tmp_path, threads=1)) as reader:
        assert "rows beyond" in reader.read(RestorePlan(g, packed_pages(0, 1)), {1: name}, views)[1][1]
        raw: list[tuple[Page, tuple[int, ...]]] = [(page(3, True, Piece(1, True, 0, 0, 3)), (1,))]
        assert "rows beyond" in reader.read(RestorePlan(g, raw), {1: name}, views)[1][1]
