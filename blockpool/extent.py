"""Extents: one safetensors file per commit with the rows that the commit added, layer-major.

    packed.{layer}  uint32 [packed rows, words]     raw.{layer}  uint32 [raw rows, words]
    tokens          int32  [rows]                   checks       uint64 [layers x stripes]

A *stripe* is up to `stripe_rows` rows of one layer; `checks` holds its XXH3-64: packed stripes layer by layer, then raw ones.
In a sealed space rows, tokens and page records are ciphertext of the same length, `tags` uint64 [2 x (2 + stripes)] holds the GCM
tags (tokens, page records, stripes), and `checks` is over the ciphertext, so that a file can be checked without its key.
The file is named after the SHA-256 of its header, the header holds the hash of `checks` and `tokens`, `checks` covers the rest:
no byte of the file goes unchecked. The file's rows are never rewritten.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agentmem.blockpool.files import Files
from agentmem.blockpool.vault import TAG_BYTES, Locked, Seal, Stream, Vaults

FORMAT_VERSION = "1"
MAX_HEADER = 64 << 20
STRIPE_BYTES = 1 << 20
SUFFIX = ".safetensors"
TABLES = ("tokens", "checks", "tags")
ITEM_BYTES = {"I32": 4, "U32": 4, "U64": 8}


class ExtentCorrupt(Exception):
    """The file is truncated, altered, foreign, or not an extent. The message names how."""


class ExtentLocked(ExtentCorrupt):
    """The extent is sealed, and there is no key that opens it."""


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


def write_extent(folder: Path, data: ExtentData, files: Files, seal: Seal | None = None) -> tuple[str, int]:
    """Write `data` durably, sealed where its space is; returns (file name, bytes).

    Protocol: temporary file in the same folder (O_EXCL, 0600) -> fsync -> rename to the content name -> fsync of the folder.
    Raises OSError; the temporary file is removed then.
    """
    meta = {
        "agentmem": FORMAT_VERSION,
        "fingerprint": data.fingerprint,
        "namespace": data.namespace,
        "nonce": secrets.token_hex(16),  # two agents may come to the very same rows; each turn owns its file
        "pages": json.dumps(data.pages, separators=(",", ":")),
    }
    tags: list[tuple[str, str, np.ndarray]] = []
    if seal is not None:
        data, tags = _sealed(data, meta, seal)
    checks = np.fromiter((*_stripe_sums(data.packed), *_stripe_sums(data.raw)), dtype=np.uint64)
    tensors: list[tuple[str, str, np.ndarray]] = [
        ("tokens", "I32", data.tokens.astype(np.int32)),
        ("checks", "U64", checks),
        *tags,
        *((f"packed.{i}", "U32", a) for i, a in enumerate(data.packed) if len(a)),
        *((f"raw.{i}", "U32", a) for i, a in enumerate(data.raw) if len(a)),
    ]
    sums = xxhash.xxh3_64(b"".join(array.tobytes() for name, _, array in tensors if name in TABLES))
    header = _header({**meta, "sum": f"{sums.intdigest():016x}"}, tensors)
    name = hashlib.sha256(header).hexdigest() + SUFFIX
    buffers: list[bytes | memoryview] = [
        struct.pack("<Q", len(header)),
        header,
        *(memoryview(np.ascontiguousarray(a)).cast("B") for _, _, a in tensors if a.size),
    ]
    files.write_durably(folder / name, buffers)
    return name, sum(len(b) for b in buffers)


def _sealed(
    data: ExtentData, meta: dict[str, str], seal: Seal
) -> tuple[ExtentData, list[tuple[str, str, np.ndarray]]]:
    """Ciphertext in place of rows, tokens and page records (in `meta`), and the tensor of tags."""
    meta["sealed"] = "aes-256-gcm"
    shapes = {
        f"{kind}.{i}": list(rows.shape)
        for kind, layers in (("packed", data.packed), ("raw", data.raw))
        for i, rows in enumerate(layers)
        if len(rows)
    }
    stream = seal.stream(bytes.fromhex(meta["nonce"]), _bound(meta, shapes))
    tags: list[bytes] = []

    def sealed(plain: bytes | memoryview) -> bytes:
        text, tag = stream.seal(len(tags), plain)
        tags.append(tag)
        return text

    tokens = np.frombuffer(sealed(data.tokens.astype(np.int32).tobytes()), np.int32)
    meta["pages"] = base64.b64encode(sealed(meta["pages"].encode())).decode()
    layers = [[_sealed_rows(rows, sealed) for rows in kind] for kind in (data.packed, data.raw)]
    new = ExtentData(data.fingerprint, data.namespace, tokens, layers[0], layers[1], data.pages)
    return new, [("tags", "U64", np.frombuffer(b"".join(tags), np.uint64))]


def _sealed_rows(rows: np.ndarray, seal: Callable[[memoryview], bytes]) -> np.ndarray:
    """The ciphertext of one layer's rows, stripe by stripe."""
    out = np.empty(rows.shape, np.uint32)
    step = stripe_rows(rows.shape[1])
    for a in range(0, len(rows), step):
        part = memoryview(np.ascontiguousarray(rows[a : a + step])).cast("B")
        memoryview(out[a : a + step]).cast("B")[:] = seal(part)
    return out


def _bound(meta: dict[str, str], shapes: dict[str, list[int]]) -> bytes:
    """What a sealed extent's pieces are bound to, besides their places."""
    names = ("agentmem", "sealed", "fingerprint", "namespace", "nonce")
    return json.dumps([*(meta[k] for k in names), shapes], sort_keys=True).encode()


def _header(meta: dict[str, str], tensors: list[tuple[str, str, np.ndarray]]) -> bytes:
    table: dict[str, Any] = {}
    offset = 0
    for name, dtype, array in tensors:
        table[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    table["__metadata__"] = meta
    text = json.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


class Extent:
    """An open extent, its header verified. Safe to read from several threads at once; close it when done.

    Raises ExtentCorrupt from the constructor and from `check`, OSError for I/O errors.
    """

    def __init__(self, path: Path, vaults: Vaults | None = None) -> None:
        self.path = path
        self._vaults = vaults
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
        self._tokens, checks = self._bytes(table, "tokens"), self._bytes(table, "checks")
        self._tags = self._bytes(table, "tags") if "tags" in table else b""
        if f"{xxhash.xxh3_64_intdigest(self._tokens + checks + self._tags):016x}" != self.meta["sum"]:
            raise ExtentCorrupt("token or checksum table is altered")
        self._checks = np.frombuffer(checks, dtype=np.uint64)
        self._first_check = self._check_offsets()
        self.sealed = "sealed" in self.meta
        if self.sealed and len(self._tags) != TAG_BYTES * (2 + len(self._checks)):
            raise ExtentCorrupt("table of tags has the wrong length")

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

    @cached_property
    def _stream(self) -> Stream:
        """Raises ExtentLocked when the extent is sealed and its key is not there."""
        try:
            seal = self._vaults.seal(self.meta["namespace"]) if self._vaults is not None else None
        except Locked as e:
            raise ExtentLocked(str(e)) from e
        if seal is None:
            raise ExtentLocked("the extent is sealed, and there is no key")
        shapes = {k: shape for k, (_, shape) in self._at.items() if k.startswith(("packed.", "raw."))}
        return seal.stream(bytes.fromhex(self.meta["nonce"]), _bound(self.meta, shapes))

    def _open_piece(self, number: int, data: bytes | bytearray) -> bytes:
        tag = self._tags[TAG_BYTES * number : TAG_BYTES * (number + 1)]
        try:
            return self._stream.open(number, data, tag)
        except Locked as e:
            raise ExtentLocked(str(e)) from e

    def open_stripe(self, raw: bool, layer: int, stripe: int, data: bytearray) -> bytes:
        """The rows of a sealed stripe. Raises ExtentLocked."""
        first = self._first_check[f"{'raw' if raw else 'packed'}.{layer}"]
        return self._open_piece(2 + first + stripe, data)

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32 [rows]. Raises ExtentLocked."""
        return np.frombuffer(self._open_piece(0, self._tokens) if self.sealed else self._tokens, np.int32)

    def pages(self) -> list[dict[str, Any]]:
        """The page records of the commit, from which the index can be rebuilt. Raises ExtentLocked."""
        text: bytes | str = self.meta["pages"]
        return list(json.loads(self._open_piece(1, base64.b64decode(text)) if self.sealed else text))

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
        return Extent(self.path, self._vaults)

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
