"""Chains of pages as extents tell them: of a page that several extents hold, the place that a merge gave it last."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.blockpool.chains import Chains
from agentmem.blockpool.extent import write_extent
from agentmem.blockpool.files import Files
from agentmem.blockpool.page import page_key, root_key
from tests.blockpool.layout import PAGE, extent_data, geometry

PLACE = ("f" * 64, "default")
IDS = np.arange(3 * PAGE, dtype=np.int32)


def record(number: int, raw: bool, *pieces: tuple[str | None, bool, int, int, int]) -> dict[str, Any]:
    """Page `number` of the chain along IDS."""
    keys = [root_key(*PLACE)]
    for first in range(0, len(IDS), PAGE):
        keys.append(page_key(keys[-1], IDS[first : first + PAGE]))
    rows = sum(piece[4] for piece in pieces)
    key = page_key(keys[number], IDS[number * PAGE : number * PAGE + rows])
    return {"key": key.hex(), "parent": keys[number].hex(), "raw": raw, "rows": rows, "pieces": pieces}


def write(folder: Path, packed: list[int], raw: list[int], *records: dict[str, Any]) -> str:
    """An extent of those rows of the chain; returns its name."""
    folder.mkdir(exist_ok=True)
    data = replace(extent_data(geometry(), len(packed), len(raw)), pages=list(records))
    return write_extent(folder, replace(data, tokens=IDS[[*packed, *raw]]), Files())[0]


def written_until(right: Callable[[str], bool], write: Callable[[], str], folder: Path) -> str:
    """Names are random: write until one is `right`."""
    while not right(name := write()):
        (folder / name).unlink()
    return name


@pytest.mark.parametrize("before", [operator.lt, operator.gt])
def test_a_merged_page_is_found_where_it_lies_packed(
    tmp_path: Path, before: Callable[[str, str], bool]
) -> None:
    """The turn's extent is still needed for the page behind it."""
    folder = tmp_path / "extents"
    whole = range(PAGE)
    turn = write(folder, [], [*whole, 16, 17], record(0, False, (None, True, 0, 0, PAGE)),
                 record(1, True, (None, True, PAGE, 0, 2)))  # fmt: skip
    merged = written_until(
        lambda name: before(name, turn),
        lambda: write(folder, list(whole), [], record(0, False, (None, False, 0, 0, PAGE))),
        folder,
    )
    chains = Chains(folder)
    chain = chains.along(*PLACE, IDS[: PAGE + 2])
    assert [p.rows for p, _ in chain.pages] == [PAGE, 2]
    assert [[x.raw for x in pieces] for _, pieces in chain.pages] == [[False], [True]]
    assert set(chains.used) == {turn, merged}
    assert chains.unused == []


@pytest.mark.parametrize("before", [operator.lt, operator.gt])
def test_what_a_merge_left_behind_is_unused(tmp_path: Path, before: Callable[[str, str], bool]) -> None:
    """As when a process dies before it unlinks what it has merged."""
    folder = tmp_path / "extents"
    first = write(folder, list(range(PAGE)), [], record(0, False, (None, False, 0, 0, PAGE)))
    second = write(folder, list(range(PAGE, 2 * PAGE)), [], record(1, False, (None, False, 0, 0, PAGE)))
    merged = written_until(
        lambda name: before(name, first) and before(name, second),
        lambda: write(folder, list(range(2 * PAGE)), [], record(0, False, (None, False, 0, 0, PAGE)),
                      record(1, False, (None, False, PAGE, 0, PAGE))),
        folder,
    )  # fmt: skip
    chains = Chains(folder)
    assert len(chains.along(*PLACE, IDS).pages) == 2
    assert list(chains.used) == [merged]
    assert sorted(chains.unused) == sorted([first, second])


def test_a_record_that_needs_a_missing_extent_gives_way(tmp_path: Path) -> None:
    folder = tmp_path / "extents"
    gone = "0" * 64 + ".safetensors"
    write(folder, list(range(8)), [], record(0, False, (gone, False, 0, 0, 8), (None, False, 0, 8, 8)))
    whole = write(folder, list(range(PAGE)), [], record(0, False, (None, False, 0, 0, PAGE)))
    chains = Chains(folder)
    assert len(chains.along(*PLACE, IDS).pages) == 1
    assert list(chains.used) == [whole]


@pytest.mark.parametrize("pieces", [None, 3, [[None]], [None]])
def test_an_extent_with_records_of_another_shape_is_bad(tmp_path: Path, pieces: Any) -> None:
    folder = tmp_path / "extents"
    name = write(
        folder, list(range(PAGE)), [], {**record(0, False, (None, False, 0, 0, PAGE)), "pieces": pieces}
    )
    assert list(Chains(folder).bad) == [name]
