"""Rows read straight out of an SQLite file, however damaged: every leaf page is decoded on its own.

Nothing that is found is trusted: callers keep only rows whose own checksum is right.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentmem.blockpool.wal import PAGE_SIZE, read_log

FILE_HEADER = 100

_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


def carve(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """(rowid, columns) of every row that can be decoded, of whatever table; text comes as str, blobs as bytes."""
    pages = _pages(path)
    for number, page in pages.items():
        yield from _leaf(page, FILE_HEADER if number == 1 else 0, pages)


def _pages(path: Path) -> dict[int, bytes]:
    """The file's pages by number, with what finished transactions left in the write-ahead log."""
    data = path.read_bytes() if path.is_file() else b""
    pages = {i // PAGE_SIZE + 1: data[i : i + PAGE_SIZE] for i in range(0, len(data), PAGE_SIZE)}
    log = path.with_name(f"{path.name}-wal")
    frames = read_log(log.read_bytes()) if log.is_file() else None
    return pages | frames.content() if frames is not None else pages


def _leaf(page: bytes, start: int, pages: dict[int, bytes]) -> Iterator[tuple[int, list[Any]]]:
    """Rows of one page, taken for a leaf of a table whatever its type byte says."""
    if len(page) < PAGE_SIZE:
        page = page.ljust(PAGE_SIZE, b"\0")
    for i in range(start + 8, PAGE_SIZE - 1, 2):
        (cell,) = struct.unpack_from(">H", page, i)
        if not i < cell < PAGE_SIZE:  # behind the last pointer, or a damaged one
            if cell == 0:
                return
            continue
        try:
            size, at = _varint(page, cell)
            rowid, at = _varint(page, at)
            yield rowid, _record(_payload(page, at, size, pages))
        except (ValueError, IndexError, struct.error):
            continue


def _payload(page: bytes, at: int, size: int, pages: dict[int, bytes]) -> bytes:
    """A cell's content, with its overflow pages."""
    most = PAGE_SIZE - 35
    if size <= most:
        return page[at : at + size]
    least = (PAGE_SIZE - 12) * 32 // 255 - 23
    local = least + (size - least) % (PAGE_SIZE - 4)
    local = local if local <= most else least
    if size > len(pages) * PAGE_SIZE:
        raise ValueError("longer than the file")
    parts = [page[at : at + local]]
    (number,) = struct.unpack_from(">I", page, at + local)
    for _ in range((size - local + PAGE_SIZE - 5) // (PAGE_SIZE - 4)):
        following = pages.get(number)
        if following is None:
            raise ValueError("broken chain of overflow pages")
        (number,) = struct.unpack_from(">I", following)
        parts.append(following[4:])
    return b"".join(parts)[:size]


def _record(payload: bytes) -> list[Any]:
    length, at = _varint(payload, 0)
    kinds = []
    while at < length:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    at = length
    columns = []
    for kind in kinds:
        value, at = _value(payload, at, kind)
        columns.append(value)
    if at != len(payload):
        raise ValueError("no record")
    return columns


def _value(payload: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind == 0:
        return None, at
    if kind in (8, 9):
        return kind - 8, at
    if kind == 7:
        return struct.unpack_from(">d", payload, at)[0], at + 8
    if kind in _INTEGER_BYTES:
        end = at + _INTEGER_BYTES[kind]
        return int.from_bytes(payload[at:end], "big", signed=True), end
    if kind < 12:
        raise ValueError("no such type")
    end = at + (kind - 12) // 2
    return payload[at:end] if kind % 2 == 0 else payload[at:end].decode(), end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(9):
        byte = data[at + i]
        if i == 8:
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + i + 1
    raise AssertionError("unreachable")
