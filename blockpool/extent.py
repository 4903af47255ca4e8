"""Extents: one safetensors file per commit with the rows that the commit added, layer-major.

    packed.{layer}  uint32 [packed rows, words]     raw.{layer}  uint32 [raw rows, words]
    tokens          int32  [rows]                   checks       uint64 [layers x stripes]

A *stripe* is up to `stripe_rows` rows of one layer; `checks` holds its XXH3-64: packed stripes layer by layer, then raw ones.
The file is named after the SHA-256 of its header, the header holds the hash of `checks` and `tokens`, `checks` covers the rest:
no byte of the file goes unchecked. The file's rows are never rewritten.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agentmem.blockpool.files import Files

FORMAT_VERSION = "1"
MAX_HEADER = 64 << 20
STRIPE_BYTES = 1 << 20
SUFFIX = ".safetensors"
ITEM_BYTES = {"I32": 4, "U32": 4, "U64": 8}


class ExtentCorrupt(Exception):
    """The file is truncated, altered, foreign, or not an extent. The message names how."""


def stripe_rows(words: int) -> int:
    """Rows per stripe: about 1 MiB, which still lies in a core's cache when it is hashed after the read."""
    return max(64, STRIPE_BYTES // (4 * words))


def _stripe_sums(rows: list[np.ndarray]) -> Iterator[int]:
    for layer in rows:
        step = stripe_rows(layer.shape[1])
        for a in range(0, len(layer), step):
            yield xxhash.xxh3_64_intdigest(np.ascontiguousarray(layer[a : a + step]).data)


@dataclass(frozen=True, slots=True)
class ExtentData:
    """What one commit adds. `packed`/`raw`: one uint32 array [rows, words] per layer; `pages`: JSON-able page records."""

    fingerprint: str
    namespace: str
    tokens: np.ndarray
    packed: list[np.ndarray]
    raw: list[np.ndarray]
    pages: list[dict[str, Any]]


def write_extent(folder: Path, data: ExtentData, files: Files) -> tuple[str, int]:
    """Write `data` durably; returns (file name, bytes).

    Protocol: temporary file in the same folder (O_EXCL, 0600) -> fsync -> rename to the content name -> fsync of the folder.
    Raises OSError; the temporary file is removed then.
    """
    checks = np.fromiter((*_stripe_sums(data.packed), *_stripe_sums(data.raw)), dtype=np.uint64)
    tensors: list[tuple[str, str, np.ndarray]] = [
        ("tokens", "I32", data.tokens.astype(np.int32)),
        ("checks", "U64", checks),
        *((f"packed.{i}", "U32", a) for i, a in enumerate(data.packed) if len(a)),
        *((f"raw.{i}", "U32", a) for i, a in enumerate(data.raw) if len(a)),
    ]
    header = _header(data, tensors)
    name = hashlib.sha256(header).hexdigest() + SUFFIX
    buffers: list[bytes | memoryview] = [
        struct.pack("<Q", len(header)),
        header,
        *(memoryview(np.ascontiguousarray(a)).cast("B") for _, _, a in tensors if a.size),
    ]
    files.write_durably(folder / name, buffers)
    return name, sum(len(b) for b in buffers)


def _header(data: ExtentData, tensors: list[tuple[str, str, np.ndarray]]) -> bytes:
    table: dict[str, Any] = {}
    offset = 0
    for name, dtype, array in tensors:
        table[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    table["__metadata__"] = {
        "agentmem": FORMAT_VERSION,
        "fingerprint": data.fingerprint,
        "namespace": data.namespace,
        "nonce": secrets.token_hex(8),  # two agents may come to the very same rows; each turn owns its file
        "pages": json.dumps(data.pages, separators=(",", ":")),
        "sum": f"{xxhash.xxh3_64_intdigest(tensors[0][2].tobytes() + tensors[1][2].tobytes()):016x}",
    }
    text = json.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


class Extent:
    """An open extent, its header verified. Safe to read from several threads at once; close it when done.

    Raises ExtentCorrupt from the constructor and from `check`, OSError for I/O errors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = _open(path)
        try:
            self._state = _state(self.fd)
            self._read_header()
        except BaseException:
            os.close(self.fd)
            raise

    def _read_header(self) -> None:
        size = os.fstat(self.fd).st_size
        prefix = os.pread(self.fd, 8, 0)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ExtentCorrupt("header length is beyond the file")
        header = os.pread(self.fd, length, 8)
        if hashlib.sha256(header).hexdigest() + SUFFIX != self.path.name:
            raise ExtentCorrupt("header does not match the file's name")
        try:
            self._read_tables(json.loads(header), 8 + length, size)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ExtentCorrupt(f"not an extent of ours: {type(e).__name__}: {e}") from e

    def _read_tables(self, table: dict[str, Any], start: int, size: int) -> None:
        """Take in a header whose hash is right; its writer may still be another program."""
        self.meta: dict[str, str] = table.pop("__metadata__")
        if self.meta.get("agentmem") != FORMAT_VERSION:
            raise ExtentCorrupt(
                f"format version {self.meta.get('agentmem')!r}, this release reads {FORMAT_VERSION!r}"
            )
        self._at = {k: (start + v["data_offsets"][0], v["shape"]) for k, v in table.items()}
        for name, entry in table.items():
            a, b = entry["data_offsets"]
            if a < 0 or b - a != math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]:
                raise ExtentCorrupt(f"offsets of {name} do not match its shape")
        if start + max(v["data_offsets"][1] for v in table.values()) != size:
            raise ExtentCorrupt("file size does not match its header")
        tokens, checks = self._bytes(table, "tokens"), self._bytes(table, "checks")
        if f"{xxhash.xxh3_64_intdigest(tokens + checks):016x}" != self.meta["sum"]:
            raise ExtentCorrupt("token or checksum table is altered")
        self.tokens = np.frombuffer(tokens, dtype=np.int32)
        self._checks = np.frombuffer(checks, dtype=np.uint64)
        self._first_check = self._check_offsets()

    def _bytes(self, table: dict[str, Any], name: str) -> bytes:
        a, b = table[name]["data_offsets"]
        return os.pread(self.fd, b - a, self._at[name][0])

    def _check_offsets(self) -> dict[str, int]:
        """Index of each tensor's first stripe in `checks`."""
        firsts, at = {}, 0
        for kind in ("packed", "raw"):
            for layer in range(sum(k.startswith(kind + ".") for k in self._at)):
                name = f"{kind}.{layer}"
                firsts[name] = at
                rows, words = self._at[name][1]
                at += -(-rows // stripe_rows(words))
        if at != len(self._checks):
            raise ExtentCorrupt("checksum table has the wrong length")
        return firsts

    def pages(self) -> list[dict[str, Any]]:
        """The page records of the commit, from which the index can be rebuilt."""
        return list(json.loads(self.meta["pages"]))

    def locate(self, raw: bool, layer: int) -> tuple[int, int, int]:
        """(file offset, rows, words per row) of a layer's rows; (0, 0, 0) when the extent has none of that kind."""
        offset, shape = self._at.get(f"{'raw' if raw else 'packed'}.{layer}", (0, [0, 0]))
        return offset, shape[0], shape[1]

    def check(self, raw: bool, layer: int, stripe: int, digest: int) -> None:
        """Raises ExtentCorrupt unless `digest` is the stripe's checksum."""
        name = f"{'raw' if raw else 'packed'}.{layer}"
        if int(self._checks[self._first_check[name] + stripe]) != digest:
            raise ExtentCorrupt(f"checksum of {name} stripe {stripe} does not match")

    def again(self) -> Extent:
        """The same extent opened anew; its header is not read again while the file has not been touched."""
        other = copy.copy(self)
        other.fd = _open(self.path)
        if _state(other.fd) == self._state:
            return other
        os.close(other.fd)
        return Extent(self.path)

    def close(self) -> None:
        os.close(self.fd)


def _open(path: Path) -> int:
    """A descriptor of a regular file; neither follows a link nor waits for a pipe's other end."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ExtentCorrupt("not a regular file")
    return fd


def _state(fd: int) -> tuple[int, int, int]:
    """What tells that a file was touched: its inode, size and time of change."""
    s = os.fstat(fd)
    return s.st_ino, s.st_size, s.st_ctime_ns
