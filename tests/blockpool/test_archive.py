"""The archive's file format: what is written is read, is a safetensors file, and nothing altered gets through."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from agentmem.blockpool.archive import MAX_HEADER, Archive, ArchiveInvalid, ArchiveWriter, Shape

SHAPE = Shape(packed_rows=70, raw_rows=5, log=3, words=((8, 24), (4, 12)))
MANIFEST = json.dumps({"agent": "ada", "text": 'ümlaut "quoted"'})


def rows(raw: bool, layer: int) -> np.ndarray:
    tensor = SHAPE.tensors[f"{'raw' if raw else 'packed'}.{layer}"]
    rng = np.random.default_rng(10 * layer + raw)
    return rng.integers(0, 1 << 32, tensor.shape, dtype=np.uint32)


def write(path: Path, manifest: str = MANIFEST) -> Path:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    writer = ArchiveWriter(fd, SHAPE, manifest, np.arange(75), np.array([7, 8, 9]))
    for layer in (1, 0):
        for raw in (True, False):
            part = rows(raw, layer)
            writer.put(raw, layer, 2, part[2:])
            writer.put(raw, layer, 0, part[:2])
    assert writer.finish() == path.stat().st_size
    os.close(fd)
    return path


def read(data: bytes, path: Path) -> Archive:
    """Open bytes as an archive and check all of them."""
    path.write_bytes(data)
    with path.open("rb") as file:
        archive = Archive(file.fileno())
    archive.verify()
    return archive


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("archive") / "a").read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "a"


def test_what_is_written_is_read(valid: bytes, scratch: Path) -> None:
    archive = read(valid, scratch)
    assert archive.manifest == MANIFEST
    assert archive.shape == SHAPE
    assert archive.tokens.tolist() == list(range(75))
    assert archive.log.tolist() == [7, 8, 9]
    for raw in (False, True):
        for layer, part in enumerate(archive.rows(raw)):
            np.testing.assert_array_equal(part, rows(raw, layer))


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "a.safetensors"), framework="numpy") as file:
        assert file.metadata()["manifest"] == MANIFEST
        assert set(file.keys()) == set(SHAPE.tensors)
        np.testing.assert_array_equal(file.get_tensor("raw.1"), rows(True, 1))


@pytest.mark.parametrize("shape", [Shape(0, 0, 0, ((1, 1),)), Shape(0, 3, 2, ((1, 2),) * 11)])
def test_archives_without_some_rows(shape: Shape, scratch: Path) -> None:
    fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    ArchiveWriter(fd, shape, "{}", np.zeros(shape.raw_rows), np.zeros(shape.log)).finish()
    os.close(fd)
    assert read(scratch.read_bytes(), scratch).shape == shape


def test_a_manifest_that_no_reader_accepts_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArchiveInvalid) as error:
        write(tmp_path / "a", "x" * (MAX_HEADER + 1))
    assert error.value.flaw == "manifest"


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    table, rest = header_of(data)
    change(table)
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + rest


FLAWS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "empty": ("header", lambda d: b""),
    "short": ("header", lambda d: d[:7]),
    "huge header": ("header", lambda d: struct.pack("<Q", 1 << 62) + d[8:]),
    "cut in the header": ("truncated", lambda d: d[:100]),
    "cut in the rows": ("truncated", lambda d: d[:-1]),
    "longer": ("truncated", lambda d: d + b"\0"),
    "no JSON": ("header", lambda d: d[:8] + b"\xff" + d[9:]),
    "deep JSON": ("header", lambda d: struct.pack("<Q", 1 << 20) + b"[" * (1 << 20)),
    "a list": ("header", lambda d: struct.pack("<Q", 2) + b"[]"),
    "a name twice": ("header", lambda d: struct.pack("<Q", 15) + b'{"a":1, "a": 2}'),
    "a huge number": ("header", lambda d: struct.pack("<Q", 5005) + b'{"a":' + b"9" * 4999 + b"}"),
    "no metadata": ("header", lambda d: with_header(d, lambda t: t.pop("__metadata__"))),
    "metadata of numbers": ("header", lambda d: with_header(d, lambda t: t.update(__metadata__={"a": 1}))),
    "another version": (
        "version",
        lambda d: with_header(d, lambda t: t["__metadata__"].update(agentmem_archive="2")),
    ),
    "half a surrogate": (
        "manifest",
        lambda d: with_header(d, lambda t: t["__metadata__"].update(manifest="\ud800")),
    ),
    "another manifest": (
        "checksum",
        lambda d: with_header(d, lambda t: t["__metadata__"].update(manifest="{}")),
    ),
    "no layers": ("layout", lambda d: with_header(d, lambda t: [t.pop(k) for k in ("packed.0", "packed.1")])),
    "a missing layer": ("layout", lambda d: with_header(d, lambda t: t.pop("raw.1"))),
    "a foreign tensor": ("layout", lambda d: with_header(d, lambda t: t.update(more=t["log"]))),
    "another type": ("layout", lambda d: with_header(d, lambda t: t["log"].update(dtype="U32"))),
    "a negative shape": ("layout", lambda d: with_header(d, lambda t: t["log"].update(shape=[-3]))),
    "a shape of text": ("layout", lambda d: with_header(d, lambda t: t["log"].update(shape=["3"]))),
    "too many dimensions": ("layout", lambda d: with_header(d, lambda t: t["log"].update(shape=[3, 1]))),
    "overlapping tensors": (
        "layout",
        lambda d: with_header(d, lambda t: t["raw.1"].update(data_offsets=t["raw.0"]["data_offsets"])),
    ),
    "too many rows": (
        "layout",
        lambda d: with_header(d, lambda t: [t[f"packed.{i}"].update(shape=[1 << 40, 8]) for i in (0, 1)]),
    ),
    "an entry of text": ("layout", lambda d: with_header(d, lambda t: t.update(log="log"))),
    "other tokens": ("checksum", lambda d: d.replace(struct.pack("<ii", 30, 31), struct.pack("<ii", 30, 32))),
    "other rows": ("checksum", lambda d: d[:-1] + bytes([d[-1] ^ 1])),
}


@pytest.mark.parametrize("name", FLAWS)
def test_each_way_to_be_bad_has_its_name(valid: bytes, scratch: Path, name: str) -> None:
    flaw, damage = FLAWS[name]
    with pytest.raises(ArchiveInvalid) as error:
        read(damage(valid), scratch)
    assert error.value.flaw == flaw, error.value


def test_a_flipped_bit_behind_the_header_is_seen(valid: bytes, scratch: Path) -> None:
    (length,) = struct.unpack("<Q", valid[:8])
    for at in range(8 + length, len(valid), 3):
        damaged = bytearray(valid)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(ArchiveInvalid):
            read(bytes(damaged), scratch)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_is_worse_than_a_refusal(valid: bytes, scratch: Path, data: st.DataObject) -> None:
    damaged = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        piece = data.draw(st.binary(max_size=6))
        match data.draw(st.sampled_from(["set", "insert", "cut"])):
            case "set":
                damaged[at : at + len(piece)] = piece
            case "insert":
                damaged[at:at] = piece
            case "cut":
                del damaged[at : at + data.draw(st.integers(1, 40))]
        damaged = damaged or bytearray(b"\0")
    try:
        archive = read(bytes(damaged), scratch)
    except ArchiveInvalid:
        return
    assert archive.manifest == MANIFEST
    assert archive.tokens.tolist() == list(range(75))


@settings(max_examples=100, deadline=None)
@given(text=st.binary(max_size=300), rest=st.binary(max_size=100))
def test_random_bytes_are_refused(scratch: Path, text: bytes, rest: bytes) -> None:
    with pytest.raises(ArchiveInvalid):
        read(struct.pack("<Q", len(text)) + text + rest, scratch)
