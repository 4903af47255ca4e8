"""Archives: one portable safetensors file with everything that one agent remembers.

    checks       uint64 [layers x stripes]    XXH3-64 of every stripe: packed stripes layer by layer, then raw ones
    tokens       int32  [packed + raw rows]   token ids of the pages, page after page
    log          int32  [ids]                 token ids of the turns, turn after turn
    packed.{l}   uint32 [packed rows, words]  raw.{l}  uint32 [raw rows, words]

The metadata holds the manifest (JSON), its SHA-256, and one XXH3-64 over `checks`, `tokens` and `log`. A reader takes nothing on
trust: the header must be the one that this module writes for the shapes it names, and the file must end where it says.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import xxhash

from agentmem.blockpool.extent import stripe_rows

ARCHIVE_VERSION = "1"
MAX_HEADER = 32 << 20
MAX_LAYERS = 1024
MAX_WORDS = 1 << 20
MAX_ROWS = 1 << 31
DTYPES: dict[str, Any] = {"I32": np.int32, "U32": np.uint32, "U64": np.uint64}
LAYER = re.compile(r"packed\.(0|[1-9][0-9]{0,3})")

Flaw = Literal["truncated", "header", "version", "layout", "checksum", "manifest", "geometry", "pages", "log"]


class ArchiveInvalid(Exception):
    """The file is no archive that can be used. `flaw` names the way it is bad, the message says more."""

    def __init__(self, flaw: Flaw, message: str) -> None:
        super().__init__(message)
        self.flaw = flaw


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file; `start` and `end` are bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def entry(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": [self.start, self.end]}


@dataclass(frozen=True)
class Shape:
    """How much an archive holds. `words`: (packed, raw) words per row of each layer."""

    packed_rows: int
    raw_rows: int
    log: int
    words: tuple[tuple[int, int], ...]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, in the order of the file."""
        table: dict[str, Tensor] = {}
        at = 0
        for name, dtype, shape in self._plan():
            size = np.dtype(DTYPES[dtype]).itemsize * int(np.prod(shape, dtype=object))
            table[name] = Tensor(dtype, shape, at, at + size)
            at += size
        return table

    def _plan(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        stripes = sum(
            -(-rows // stripe_rows(words[kind]))
            for kind, rows in enumerate((self.packed_rows, self.raw_rows))
            for words in self.words
        )
        yield "checks", "U64", (stripes,)
        yield "tokens", "I32", (self.packed_rows + self.raw_rows,)
        yield "log", "I32", (self.log,)
        for kind, (name, rows) in enumerate((("packed", self.packed_rows), ("raw", self.raw_rows))):
            for layer, words in enumerate(self.words):
                yield f"{name}.{layer}", "U32", (rows, words[kind])

    @property
    def bytes(self) -> int:
        """Bytes behind the header."""
        return max(t.end for t in self.tensors.values())


def header(shape: Shape, manifest: str, total: int) -> bytes:
    """The file's first bytes: length and JSON. `total` is the XXH3-64 over the tables; its value does not change the length.

    Raises ArchiveInvalid when the manifest is longer than a reader accepts.
    """
    table: dict[str, Any] = {name: tensor.entry() for name, tensor in shape.tensors.items()}
    table["__metadata__"] = {
        "agentmem_archive": ARCHIVE_VERSION,
        "manifest": manifest,
        "manifest_sha256": hashlib.sha256(manifest.encode()).hexdigest(),
        "sum": f"{total:016x}",
    }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ArchiveInvalid("manifest", f"the log's text takes {len(text)} bytes, at most {MAX_HEADER} fit")
    return struct.pack("<Q", len(text)) + text


def _sums(layers: list[np.ndarray]) -> Iterator[int]:
    for rows in layers:
        step = stripe_rows(rows.shape[1])
        for at in range(0, len(rows), step):
            yield xxhash.xxh3_64_intdigest(np.ascontiguousarray(rows[at : at + step]).data)


def _total(checks: np.ndarray, tokens: np.ndarray, log: np.ndarray) -> int:
    state = xxhash.xxh3_64()
    for part in (checks, tokens, log):
        state.update(np.ascontiguousarray(part).data if part.size else b"")
    return int(state.intdigest())


class ArchiveWriter:
    """Writes an archive into an empty file: rows in any order with `put`, the rest with `finish`. Raises OSError."""

    def __init__(self, fd: int, shape: Shape, manifest: str, tokens: np.ndarray, log: np.ndarray) -> None:
        self._fd, self._shape, self._manifest = fd, shape, manifest
        self._tokens, self._log = tokens.astype(np.int32), log.astype(np.int32)
        self._start = len(header(shape, manifest, 0))
        os.ftruncate(fd, self._start + shape.bytes)

    def put(self, raw: bool, layer: int, row: int, rows: np.ndarray) -> None:
        """Rows uint32 [n, words] of one layer, from `row` on."""
        tensor = self._shape.tensors[f"{'raw' if raw else 'packed'}.{layer}"]
        assert rows.shape[1] == tensor.shape[1]
        assert row + len(rows) <= tensor.shape[0]
        self._write(tensor.start + 4 * row * tensor.shape[1], rows)

    def _write(self, at: int, data: np.ndarray) -> None:
        rest = memoryview(np.ascontiguousarray(data)).cast("B") if data.size else memoryview(b"")
        while rest:
            written = os.pwrite(self._fd, rest, self._start + at)
            rest, at = rest[written:], at + written

    def finish(self) -> int:
        """Checksums and header. Returns the file's bytes."""
        tensors = self._shape.tensors
        self._write(tensors["tokens"].start, self._tokens)
        self._write(tensors["log"].start, self._log)
        size = self._start + self._shape.bytes
        with mmap.mmap(self._fd, size, access=mmap.ACCESS_READ) as memory:
            views = [
                [_view(memory, self._start, tensors[f"{kind}.{i}"]) for i in range(len(self._shape.words))]
                for kind in ("packed", "raw")
            ]
            checks = np.fromiter((s for layers in views for s in _sums(layers)), dtype=np.uint64)
            del views
        self._write(tensors["checks"].start, checks)
        head = header(self._shape, self._manifest, _total(checks, self._tokens, self._log))
        assert len(head) == self._start
        os.pwrite(self._fd, head, 0)
        return size


def _view(memory: mmap.mmap, start: int, tensor: Tensor) -> np.ndarray:
    count = (tensor.end - tensor.start) // np.dtype(DTYPES[tensor.dtype]).itemsize
    flat = np.frombuffer(memory, DTYPES[tensor.dtype], count, start + tensor.start)
    return flat.reshape(tensor.shape)


class Archive:
    """An archive opened for reading, header and tables verified; `verify` checks the rows.

    Arrays are views of the mapped file, not copies. Raises ArchiveInvalid from the constructor and from `verify`.
    """

    def __init__(self, fd: int) -> None:
        self.bytes = os.fstat(fd).st_size
        text = self._header_text(fd)
        table = _parse(text)
        meta = table.pop("__metadata__", None)
        self.manifest, total = _metadata(meta)
        self.shape = _shape(table)
        self._start = 8 + len(text)
        if self._start + self.shape.bytes != self.bytes:
            raise ArchiveInvalid(
                "truncated",
                f"the file has {self.bytes} bytes, {self._start + self.shape.bytes} are announced",
            )
        self._memory = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        self.tokens, self.log = self._array("tokens"), self._array("log")
        self._checks = self._array("checks")
        if f"{_total(self._checks, self.tokens, self.log):016x}" != total:
            raise ArchiveInvalid("checksum", "the token tables are altered")

    def _header_text(self, fd: int) -> bytes:
        prefix = os.pread(fd, 8, 0)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            raise ArchiveInvalid("header", f"a header of {length} bytes; archives have up to {MAX_HEADER}")
        text = os.pread(fd, length, 8)
        if len(text) != length:
            raise ArchiveInvalid("truncated", "the file ends inside its header")
        return text

    def _array(self, name: str) -> np.ndarray:
        return _view(self._memory, self._start, self.shape.tensors[name])

    def rows(self, raw: bool) -> list[np.ndarray]:
        """All packed or all raw rows, uint32 [rows, words] per layer."""
        kind = "raw" if raw else "packed"
        return [self._array(f"{kind}.{layer}") for layer in range(len(self.shape.words))]

    def verify(self) -> None:
        """Read every row and compare the checksums."""
        found = (s for raw in (False, True) for s in _sums(self.rows(raw)))
        for number, (wanted, digest) in enumerate(zip(self._checks, found, strict=True)):
            if int(wanted) != digest:
                raise ArchiveInvalid("checksum", f"the checksum of stripe {number} does not match")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice")
    return names


def _parse(text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ArchiveInvalid("header", f"the header is no JSON: {type(error).__name__}") from error
    if not isinstance(table, dict):
        raise ArchiveInvalid("header", "the header is no JSON object")
    return table


def _metadata(meta: Any) -> tuple[str, str]:
    """(manifest, sum over the tables) of a file that is an archive of this version."""
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise ArchiveInvalid("header", "the header has no metadata of ours")
    if meta.get("agentmem_archive") != ARCHIVE_VERSION:
        version = str(meta.get("agentmem_archive"))[:20]
        raise ArchiveInvalid(
            "version", f"archive version {version!r}; this release reads {ARCHIVE_VERSION!r}"
        )
    manifest, digest, total = (meta.get(k, "") for k in ("manifest", "manifest_sha256", "sum"))
    try:
        found = hashlib.sha256(manifest.encode()).hexdigest()
    except UnicodeEncodeError:
        raise ArchiveInvalid("manifest", "the manifest holds half of a surrogate pair") from None
    if found != digest:
        raise ArchiveInvalid("checksum", "the manifest does not match its SHA-256")
    return manifest, total


def _shape(table: dict[str, Any]) -> Shape:
    """The shape that a header announces. It must be, entry by entry, what `Shape.tensors` lays out."""
    layers = sum(LAYER.fullmatch(name) is not None for name in table)
    if not 1 <= layers <= MAX_LAYERS:
        raise ArchiveInvalid("layout", f"{layers} layers; archives have 1 to {MAX_LAYERS}")
    (log,) = _dimensions(table, "log", 1)
    packed = [_dimensions(table, f"packed.{i}", 2) for i in range(layers)]
    raw = [_dimensions(table, f"raw.{i}", 2) for i in range(layers)]
    words = tuple((p[1], r[1]) for p, r in zip(packed, raw, strict=True))
    if not all(1 <= w <= MAX_WORDS for pair in words for w in pair):
        raise ArchiveInvalid("layout", f"rows have 1 to {MAX_WORDS} words")
    shape = Shape(packed[0][0], raw[0][0], log, words)
    if table != {name: tensor.entry() for name, tensor in shape.tensors.items()}:
        raise ArchiveInvalid("layout", "names, types, shapes or offsets of the tensors do not fit together")
    return shape


def _dimensions(table: dict[str, Any], name: str, rank: int) -> list[int]:
    entry = table.get(name)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) != rank:
        raise ArchiveInvalid("layout", f"there is no tensor {name} with {rank} dimensions")
    if not all(type(n) is int and 0 <= n < MAX_ROWS for n in shape):
        raise ArchiveInvalid("layout", f"the shape of {name} is no shape")
    return shape
