"""Extents: what is written is read back, by safetensors too; whatever is altered is found."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import struct
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from agentmem.blockpool import extent as extent_module
from agentmem.blockpool.extent import Extent, ExtentCorrupt, stripe_rows, write_extent
from agentmem.blockpool.files import Files
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Piece
from agentmem.blockpool.restore import Reader, RestorePlan
from tests.blockpool.extents import PACKED, RAW, assert_right, flipped, read_all, stored_page, written
from tests.blockpool.layout import PAGE, extent_data


def test_reader_gives_back_what_was_written(folder: Path, g: Geometry) -> None:
    views, bad = read_all(written(folder, g), g)
    assert not bad
    assert_right(g, views)


def test_safetensors_itself_reads_an_extent(folder: Path, g: Geometry) -> None:
    path, data = written(folder, g), extent_data(g, PACKED, RAW)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["fingerprint"] == "f" * 64
        assert json.loads(file.metadata()["pages"]) == data.pages
        assert np.array_equal(file.get_tensor("tokens"), data.tokens)
        for layer in range(g.layers):
            assert np.array_equal(file.get_tensor(f"packed.{layer}"), data.packed[layer])
            assert np.array_equal(file.get_tensor(f"raw.{layer}"), data.raw[layer])


@pytest.mark.parametrize(("packed", "raw"), [(PAGE, 0), (0, 5)])
def test_an_extent_of_one_kind_of_rows(folder: Path, g: Geometry, packed: int, raw: int) -> None:
    path = written(folder, g, packed, raw)
    _, bad = read_all(path, g, packed, raw)
    assert not bad
    extent = Extent(path)
    try:
        assert extent.locate(packed == 0, 0)[1] == max(packed, raw)
        assert extent.locate(packed != 0, 0) == (0, 0, 0)
        assert extent.pages() == extent_data(g, packed, raw).pages
        assert np.array_equal(extent.tokens, extent_data(g, packed, raw).tokens)
    finally:
        extent.close()


def test_name_is_the_hash_of_the_header_and_the_file_is_private(folder: Path, g: Geometry) -> None:
    path = written(folder, g)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert path.name == hashlib.sha256(content[8 : 8 + length]).hexdigest() + ".safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert length % 8 == 0
    assert [p.name for p in folder.iterdir()] == [path.name]


def test_every_extent_has_a_name_of_its_own(folder: Path, g: Geometry) -> None:
    """Two agents that come to the same rows must not share a file: forgetting one would delete the other's."""
    names = {write_extent(folder, extent_data(g, PAGE, 0), Files())[0] for _ in range(3)}
    assert len(names) == 3


def test_every_byte_of_the_header_is_checked(folder: Path, g: Geometry) -> None:
    path = written(folder, g, PAGE, 0)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    survived = []
    for at in range(8 + length):
        with flipped(path, at, 1 << (at % 8)):
            try:
                Extent(path).close()
                survived.append(at)
            except (ExtentCorrupt, OSError):
                pass
    assert survived == []
    Extent(path).close()


def test_flipped_payload_bits_are_found(folder: Path, g: Geometry) -> None:
    path = written(folder, g)
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    rng = random.Random(0)
    places = [start, len(content) - 1, *(rng.randrange(start, len(content)) for _ in range(60))]
    for at in places:
        bit = 1 << rng.randrange(8)
        with flipped(path, at, bit):
            _, bad = read_all(path, g)
        assert bad, f"a flip of bit {bit} in byte {at} of {len(content)} went unseen"
    assert not read_all(path, g)[1]


def test_truncated_at_every_boundary(folder: Path, g: Geometry) -> None:
    path = written(folder, g)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    table = json.loads(content[8 : 8 + length])
    table.pop("__metadata__")
    edges = {8 + length + x for v in table.values() for x in v["data_offsets"]} | {0, 1, 7, 8, 9, 8 + length}
    for edge in sorted({e + d for e in edges for d in (-1, 0, 1)}):
        if 0 <= edge < len(content):
            path.write_bytes(content[:edge])
            assert read_all(path, g)[1], f"cut to {edge} of {len(content)} bytes"
    path.write_bytes(content + b"\0")
    assert "size" in read_all(path, g)[1][1]


def test_truncation_behind_the_readers_back_is_found(
    folder: Path, g: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file shrinks between the check of its size and the read."""
    path = written(folder, g)
    real = Extent._check_offsets

    def shrink(self: Extent) -> dict[str, int]:
        os.truncate(path, path.stat().st_size - 4)
        return real(self)

    monkeypatch.setattr(Extent, "_check_offsets", shrink)
    assert "shorter" in read_all(path, g)[1][1]


def test_small_stripes_find_every_flip_in_the_rows_that_are_used(
    folder: Path, g: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial restore reads whole stripes; a flip outside of them is not its business, one inside is."""
    monkeypatch.setattr(extent_module, "STRIPE_BYTES", 64)
    monkeypatch.setattr(extent_module, "stripe_rows", lambda words: 4)
    monkeypatch.setattr("agentmem.blockpool.restore.stripe_rows", lambda words: 4)
    path = written(folder, g)
    extent = Extent(path)
    page = stored_page(np.arange(6), False, Piece(1, False, 5, 0, 6))
    for layer in range(g.layers):
        offset, rows, words = extent.locate(False, layer)
        assert rows == PACKED
        for row in range(0, rows, 3):
            views = [np.zeros((2, w), np.uint32) for w in g.slot_words]
            with (
                flipped(path, offset + row * words * 4 + 3, 0x10),
                closing(Reader(folder, threads=2)) as reader,
            ):
                _, bad = reader.read(RestorePlan(g, [(page, (1,))]), {1: path.name}, views)
            assert bool(bad) == (4 <= row < 12), row
            if not bad:
                want = extent_data(g, PACKED, RAW).packed[0][5:11]
                assert np.array_equal(views[0][1].reshape(PAGE, -1)[:6], want)
    extent.close()


def test_stripes_are_about_a_mebibyte() -> None:
    assert stripe_rows(1024) * 4096 == 1 << 20
    assert stripe_rows(1 << 20) == 64
