"""Extents: what is written is read back, by safetensors too; whatever is altered is found."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from agentmem.blockpool import extent as extent_module
from agentmem.blockpool.extent import Extent, ExtentCorrupt, stripe_rows, write_extent
from agentmem.blockpool.files import Files
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.restore import Reader, RestorePlan
from tests.blockpool.layout import PAGE, extent_data, geometry

PACKED, RAW = 3 * PAGE, 7
SLOTS = (4, 1, 2)


@pytest.fixture
def g() -> Geometry:
    return geometry()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def written(folder: Path, g: Geometry, packed: int = PACKED, raw: int = RAW) -> Path:
    name, size = write_extent(folder, extent_data(g, packed, raw), Files())
    assert (folder / name).stat().st_size == size
    return folder / name


def named_by_header(path: Path, content: bytes) -> Path:
    """A file with `content` whose name is right for its header, as a forger would make it."""
    length = struct.unpack("<Q", content[:8])[0]
    target = path.with_name(hashlib.sha256(content[8 : 8 + length]).hexdigest() + ".safetensors")
    target.write_bytes(content)
    return target


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """The file with one bit of byte `at` turned over."""
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ bit]), at)
        yield
        os.pwrite(file.fileno(), bytes([byte]), at)


def rebuilt(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same payload behind a changed header, under the name that is right for it."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    table = json.loads(content[8 : 8 + length])
    change(table)
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return named_by_header(path, struct.pack("<Q", len(header)) + header + content[8 + length :])


def read_all(
    path: Path, g: Geometry, packed: int = PACKED, raw: int = RAW
) -> tuple[list[np.ndarray], dict[int, str]]:
    """Read every row through the reader; returns the slots' memory and what is wrong."""
    pages = [_page(np.arange(PAGE), False, Piece(1, False, i * PAGE, 0, PAGE)) for i in range(packed // PAGE)]
    placed: list[tuple[Page, tuple[int, ...]]] = [(p, (s,)) for p, s in zip(pages, SLOTS, strict=False)]
    if raw:
        placed.append(
            (_page(np.arange(raw), True, Piece(1, True, 0, 0, raw)), (5, 6, 7)[: g.slots_for(True, raw)])
        )
    views = [np.zeros((8, w), np.uint32) for w in g.slot_words]
    reader = Reader(path.parent, threads=2)
    try:
        _, bad = reader.read(RestorePlan(g, placed), {1: path.name}, views)
    finally:
        reader.close()
    return views, bad


def _page(tokens: np.ndarray, raw: bool, *pieces: Piece) -> Page:
    return Page(None, tokens, b"", raw, pieces=pieces)


def assert_right(g: Geometry, views: list[np.ndarray]) -> None:
    data = extent_data(g, PACKED, RAW)
    per = g.raw_per_slot
    for layer, view in enumerate(views):
        words = g.packed_words[layer]
        for i, slot in enumerate(SLOTS):
            rows = data.packed[layer][i * PAGE : (i + 1) * PAGE]
            assert np.array_equal(view[slot].reshape(PAGE, words), rows)
        raw = g.raw_words[layer]
        for row in range(RAW):
            at = view[5 + row // per, row % per * raw : (row % per + 1) * raw]
            assert np.array_equal(at, data.raw[layer][row])


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


def _wrong_name(path: Path) -> Path:
    return path.rename(path.with_name("0" * 64 + ".safetensors"))


def _version(path: Path) -> Path:
    return rebuilt(path, lambda t: t["__metadata__"].update(agentmem="2"))


def _no_version(path: Path) -> Path:
    return rebuilt(path, lambda t: t["__metadata__"].pop("agentmem"))


def _no_metadata(path: Path) -> Path:
    return rebuilt(path, lambda t: t.pop("__metadata__"))


def _no_sum(path: Path) -> Path:
    return rebuilt(path, lambda t: t["__metadata__"].pop("sum"))


def _no_checks(path: Path) -> Path:
    return rebuilt(path, lambda t: t.pop("checks"))


def _no_tensors(path: Path) -> Path:
    return rebuilt(path, lambda t: [t.pop(k) for k in list(t) if k != "__metadata__"])


def _odd_shape(path: Path) -> Path:
    return rebuilt(path, lambda t: t["packed.0"].update(shape=[3]))


def _zero_words(path: Path) -> Path:
    return rebuilt(path, lambda t: t["packed.0"].update(shape=[3, 0]))


def _text_offsets(path: Path) -> Path:
    return rebuilt(path, lambda t: t["tokens"].update(data_offsets=["a", "b"]))


def _fewer_rows(path: Path) -> Path:
    return rebuilt(path, lambda t: t["packed.0"]["shape"].__setitem__(0, PAGE))


def _length_lies_high(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
    return path


def _length_lies_low(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2) + content[8:])
    return path


def _empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def _directory(path: Path) -> Path:
    path.unlink()
    path.mkdir()
    return path


def _symlink(path: Path) -> Path:
    target = path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(target)
    return path


def _missing(path: Path) -> Path:
    path.unlink()
    return path


def _not_json(path: Path) -> Path:
    return named_by_header(path, struct.pack("<Q", 16) + b"{{{{{{{{{{{{{{{{" + b"\0" * 64)


def _not_an_object(path: Path) -> Path:
    return named_by_header(path, struct.pack("<Q", 8) + b"[1,2,3] " + b"\0" * 64)


def _not_text(path: Path) -> Path:
    return named_by_header(path, struct.pack("<Q", 8) + b"\xff\xfe\xfd\xfc\xff\xfe\xfd\xfc" + b"\0" * 64)


def _foreign(path: Path) -> Path:
    """Somebody else's safetensors file."""
    other = path.with_suffix(".other")
    save_file({"weight": np.ones((4, 4), np.float32)}, other)
    return named_by_header(path, other.read_bytes())


def _another_extent(path: Path) -> Path:
    """A sound extent of other rows, put in this one's place."""
    aside = path.parent / "aside"
    aside.mkdir()
    name, _ = write_extent(aside, extent_data(geometry(), PACKED, RAW, seed=9), Files())
    shutil.copy(aside / name, path)
    return path


MUTATIONS = [
    _wrong_name, _version, _no_version, _no_metadata, _no_sum, _no_checks, _no_tensors, _odd_shape,
    _zero_words, _text_offsets, _fewer_rows, _length_lies_high, _length_lies_low, _empty, _directory,
    _symlink, _missing, _not_json, _not_an_object, _not_text, _foreign, _another_extent,
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_bad_file_is_reported_and_never_raises(
    folder: Path, g: Geometry, mutation: Callable[[Path], Path]
) -> None:
    path = mutation(written(folder, g))
    _, bad = read_all(path, g)
    assert list(bad) == [1]
    assert bad[1].partition(": ")[0] in ("ExtentCorrupt", "FileNotFoundError", "IsADirectoryError", "OSError")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_constructor_closes_its_file_and_names_the_fault(
    folder: Path, g: Geometry, mutation: Callable[[Path], Path]
) -> None:
    path = mutation(written(folder, g))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with pytest.raises((ExtentCorrupt, OSError)):
        Extent(path)
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before


def test_one_bad_extent_does_not_hide_the_good_one(folder: Path, g: Geometry) -> None:
    good, bad = written(folder, g), written(folder, g, PAGE, 0)
    bad.write_bytes(b"")
    pages: list[tuple[Page, tuple[int, ...]]] = [
        (_page(np.arange(PAGE), False, Piece(1, False, 0, 0, PAGE)), (0,)),
        (_page(np.arange(PAGE), False, Piece(2, False, 0, 0, PAGE)), (1,)),
        (_page(np.arange(PAGE), False, Piece(3, False, 0, 0, PAGE)), (2,)),
    ]
    reader = Reader(folder, threads=2)
    views = [np.zeros((3, w), np.uint32) for w in g.slot_words]
    _, found = reader.read(RestorePlan(g, pages), {1: good.name, 2: bad.name}, views)
    reader.close()
    assert set(found) == {2, 3}
    assert np.array_equal(views[0][0].reshape(PAGE, -1), extent_data(g, PACKED, RAW).packed[0][:PAGE])


def test_small_stripes_find_every_flip_in_the_rows_that_are_used(
    folder: Path, g: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial restore reads whole stripes; a flip outside of them is not its business, one inside is."""
    monkeypatch.setattr(extent_module, "STRIPE_BYTES", 64)
    monkeypatch.setattr(extent_module, "stripe_rows", lambda words: 4)
    monkeypatch.setattr("agentmem.blockpool.restore.stripe_rows", lambda words: 4)
    path = written(folder, g)
    extent = Extent(path)
    page = _page(np.arange(6), False, Piece(1, False, 5, 0, 6))
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
