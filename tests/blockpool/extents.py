"""Extents in a folder, ways to alter them, and what the reader makes of them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.blockpool.extent import write_extent
from agentmem.blockpool.files import Files
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.restore import Reader, RestorePlan
from tests.blockpool.layout import PAGE, extent_data

PACKED, RAW = 3 * PAGE, 7
SLOTS = (4, 1, 2)


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


def stored_page(tokens: np.ndarray, raw: bool, *pieces: Piece) -> Page:
    return Page(None, tokens, b"", raw, pieces=pieces)


def read_all(
    path: Path, g: Geometry, packed: int = PACKED, raw: int = RAW
) -> tuple[list[np.ndarray], dict[int, str]]:
    """Read every row through the reader; returns the slots' memory and what is wrong."""
    pages = [
        stored_page(np.arange(PAGE), False, Piece(1, False, i * PAGE, 0, PAGE)) for i in range(packed // PAGE)
    ]
    placed: list[tuple[Page, tuple[int, ...]]] = [(p, (s,)) for p, s in zip(pages, SLOTS, strict=False)]
    if raw:
        placed.append(
            (
                stored_page(np.arange(raw), True, Piece(1, True, 0, 0, raw)),
                (5, 6, 7)[: g.slots_for(True, raw)],
            )
        )
    views = [np.zeros((8, w), np.uint32) for w in g.slot_words]
    reader = Reader(path.parent, threads=2)
    try:
        _, bad = reader.read(RestorePlan(g, placed), {1: path.name}, views)
    finally:
        reader.close()
    return views, bad


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
