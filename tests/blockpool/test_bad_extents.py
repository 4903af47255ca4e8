"""Files that are no extent, or not the one they should be: each is reported, none hides another."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from agentmem.blockpool.extent import Extent, ExtentCorrupt, write_extent
from agentmem.blockpool.files import Files
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.restore import Reader, RestorePlan
from tests.blockpool.extents import PACKED, RAW, named_by_header, read_all, rebuilt, stored_page, written
from tests.blockpool.layout import PAGE, extent_data, geometry


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
        (stored_page(np.arange(PAGE), False, Piece(1, False, 0, 0, PAGE)), (0,)),
        (stored_page(np.arange(PAGE), False, Piece(2, False, 0, 0, PAGE)), (1,)),
        (stored_page(np.arange(PAGE), False, Piece(3, False, 0, 0, PAGE)), (2,)),
    ]
    reader = Reader(folder, threads=2)
    views = [np.zeros((3, w), np.uint32) for w in g.slot_words]
    _, found = reader.read(RestorePlan(g, pages), {1: good.name, 2: bad.name}, views)
    reader.close()
    assert set(found) == {2, 3}
    assert np.array_equal(views[0][0].reshape(PAGE, -1), extent_data(g, PACKED, RAW).packed[0][:PAGE])
