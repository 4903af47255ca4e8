"""Sealed extents: what lies in the file is ciphertext; it opens with its key, at its place, unaltered."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from agentmem.blockpool.extent import (
    SUFFIX,
    Extent,
    ExtentCorrupt,
    ExtentData,
    ExtentLocked,
    stripe_rows,
    write_extent,
)
from agentmem.blockpool.files import Files
from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.restore import Reader, RestorePlan
from agentmem.blockpool.vault import Vaults, vault_of
from tests.blockpool.layout import PAGE, extent_data, geometry

ROWS = 40 * PAGE


@pytest.fixture
def vaults(tmp_path: Path) -> Vaults:
    return Vaults(tmp_path / "keys")


@pytest.fixture
def space(vaults: Vaults) -> str:
    return vaults.make("default", "file")


@pytest.fixture
def data(space: str) -> ExtentData:
    return replace(extent_data(geometry(), ROWS, 11), namespace=space)


@pytest.fixture
def path(tmp_path: Path, vaults: Vaults, data: ExtentData) -> Path:
    (tmp_path / "extents").mkdir()
    name, size = write_extent(tmp_path / "extents", data, Files(), vaults.seal(data.namespace))
    path = tmp_path / "extents" / name
    assert path.stat().st_size == size
    return path


def read(folder: Path, name: str, vaults: Vaults | None) -> tuple[list[np.ndarray], dict[int, str]]:
    """Every packed row, and the raw rows among the last page's, through the reader that restores use."""
    g = geometry()
    pages = [
        (Page(None, np.arange(PAGE), b"", False, pieces=(Piece(1, False, i * PAGE, 0, PAGE),)), (i,))
        for i in range(ROWS // PAGE)
    ]
    per = g.raw_per_slot
    slots = tuple(range(len(pages), len(pages) + -(-11 // per)))
    pages.append((Page(None, np.arange(11), b"", True, pieces=(Piece(1, True, 0, 0, 11),)), slots))  # type: ignore[arg-type]
    views = [np.zeros((len(pages) + len(slots), w), np.uint32) for w in g.slot_words]
    with closing(Reader(folder, vaults=vaults)) as reader:
        outcome = reader.read(RestorePlan(g, pages), {1: name}, views)  # type: ignore[arg-type]
    return views, outcome.bad


def test_rows_come_back_as_they_were(path: Path, vaults: Vaults, data: ExtentData) -> None:
    views, bad = read(path.parent, path.name, vaults)
    assert bad == {}
    g = geometry()
    for layer, view in enumerate(views):
        packed = view.reshape(-1, g.packed_words[layer])[:ROWS]
        np.testing.assert_array_equal(packed, data.packed[layer])
        per, words = g.raw_per_slot, g.raw_words[layer]
        raw = view[ROWS // PAGE :, : per * words].reshape(-1, words)[:11]
        np.testing.assert_array_equal(raw, data.raw[layer])
    with closing(Extent(path, vaults)) as extent:
        np.testing.assert_array_equal(extent.tokens, data.tokens)
        assert extent.pages() == data.pages


def test_nothing_of_it_lies_in_the_file(path: Path, data: ExtentData) -> None:
    content = path.read_bytes()
    for plain in (data.tokens, *data.packed, *data.raw):
        assert plain[:2].tobytes() not in content
    assert b'"rows"' not in content


def test_equal_rows_are_sealed_differently(
    tmp_path: Path, vaults: Vaults, data: ExtentData, path: Path
) -> None:
    name, _ = write_extent(path.parent, data, Files(), vaults.seal(data.namespace))
    assert name != path.name
    with closing(Extent(path)) as one, closing(Extent(path.parent / name)) as two:
        at, rows, words = one.locate(False, 0)
        assert at == two.locate(False, 0)[0]
        size = 4 * rows * words
        assert path.read_bytes()[at : at + size] != (path.parent / name).read_bytes()[at : at + size]


def test_without_the_key_it_is_locked_and_sound(
    path: Path, tmp_path: Path, vaults: Vaults, space: str
) -> None:
    for keyless in (None, Vaults(tmp_path / "other")):
        with closing(Extent(path, keyless)) as extent:
            with pytest.raises(ExtentLocked):
                _ = extent.tokens
            with pytest.raises(ExtentLocked):
                extent.pages()
        views, bad = read(path.parent, path.name, keyless)
        assert list(bad) == [1]
        assert not any(v.any() for v in views)
    (tmp_path / "keys" / str(vault_of(space))).write_bytes(bytes(32))
    assert "ExtentLocked" in read(path.parent, path.name, Vaults(tmp_path / "keys"))[1][1]


def sound(path: Path) -> bool:
    """Whether a file is as it was written, as far as one can tell without its key."""
    try:
        with closing(Extent(path)) as extent:
            for raw in (False, True):
                for layer in range(geometry().layers):
                    at, rows, words = extent.locate(raw, layer)
                    step = stripe_rows(words)
                    content = path.read_bytes()[at : at + 4 * rows * words]
                    for stripe in range(-(-rows // step)):
                        part = content[4 * words * step * stripe : 4 * words * step * (stripe + 1)]
                        extent.check(raw, layer, stripe, xxhash.xxh3_64_intdigest(part))
    except ExtentCorrupt:
        return False
    return True


def test_flipped_bits_are_seen_with_and_without_the_key(path: Path, vaults: Vaults) -> None:
    good = path.read_bytes()
    for at in range(0, len(good), len(good) // 150):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        assert list(read(path.parent, path.name, vaults)[1]) == [1], at
        assert not sound(path), at
    path.write_bytes(good)
    assert read(path.parent, path.name, vaults)[1] == {}
    assert sound(path)


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The extent with another header, under the name that belongs to it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    change(table)
    text = json.dumps(table, separators=(",", ":")).encode()
    new = path.with_name(hashlib.sha256(text).hexdigest() + SUFFIX)
    new.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return new


@pytest.mark.parametrize("field", ["fingerprint", "nonce"])
def test_a_header_that_was_changed_locks_the_rows(path: Path, vaults: Vaults, field: str) -> None:
    changed = rewritten(path, lambda t: t["__metadata__"].update({field: "ab" * 16}))
    with closing(Extent(changed, vaults)) as extent, pytest.raises(ExtentLocked):
        _ = extent.tokens
    assert "ExtentLocked" in read(path.parent, changed.name, vaults)[1][1]


def test_rows_of_another_layer_are_not_taken(path: Path, vaults: Vaults) -> None:
    """Two layers of one shape that change places are as wrong as altered ones."""

    def swap(table: dict[str, Any]) -> None:
        table["raw.0"], table["raw.1"] = table["raw.1"], table["raw.0"]

    with pytest.raises(ExtentCorrupt), closing(Extent(rewritten(path, swap), vaults)) as extent:
        _ = extent.tokens


def test_a_table_of_tags_must_fit(path: Path, vaults: Vaults) -> None:
    with pytest.raises(ExtentCorrupt):
        Extent(rewritten(path, lambda t: t.pop("tags")), vaults)
