"""Keepsakes: one safetensors file each, for a few arrays that belong together and what is said of them.

The file is named after the SHA-256 of its header, and the header holds a hash of the arrays' bytes: no byte goes unchecked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agentmem.blockpool.files import Files

VERSION = "1"
SUFFIX = ".safetensors"
MAX_HEADER = 1 << 20
TYPES = {"U8": 1, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "U64": 8}


class KeepsakeDamaged(Exception):
    """The file is truncated, altered, foreign, or not a keepsake. The message names how."""


@dataclass(frozen=True, slots=True)
class Array:
    """One array: a type of safetensors, its shape, and its bytes as uint8 [n]."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def __post_init__(self) -> None:
        assert self.data.dtype == np.uint8
        assert self.data.nbytes == math.prod(self.shape) * TYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Keepsake:
    """`key` is its name among all; `about` is JSON-able and never changes."""

    key: str
    about: dict[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(a.data.nbytes for a in self.arrays.values())


def write_keepsake(folder: Path, keepsake: Keepsake, fingerprint: str, files: Files) -> tuple[str, int]:
    """Write it durably; returns (file name, bytes). Raises OSError; nothing is left then."""
    digest = xxhash.xxh3_128()
    table: dict[str, Any] = {}
    at = 0
    for name, array in keepsake.arrays.items():
        digest.update(array.data.data)
        end = at + array.data.nbytes
        table[name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    table["__metadata__"] = {
        "agentmem-keepsake": VERSION,
        "fingerprint": fingerprint,
        "key": keepsake.key,
        "about": json.dumps(keepsake.about, separators=(",", ":")),
        "nonce": secrets.token_hex(8),  # what is kept, dropped and kept again has another name
        "sum": digest.hexdigest(),
    }
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    name = hashlib.sha256(header).hexdigest() + SUFFIX
    content = [a.data.data for a in keepsake.arrays.values() if a.data.size]
    files.write_durably(folder / name, [struct.pack("<Q", len(header)), header, *content])
    return name, 8 + len(header) + at


def read_keepsake(path: Path, fingerprint: str) -> Keepsake:
    """Read it whole, checked. Raises KeepsakeDamaged, OSError."""
    data = _content(path)
    length = struct.unpack("<Q", data[:8].tobytes())[0] if len(data) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER, len(data) - 8):
        raise KeepsakeDamaged("header length is beyond the file")
    header = data[8 : 8 + length].tobytes()
    if hashlib.sha256(header).hexdigest() + SUFFIX != path.name:
        raise KeepsakeDamaged("header does not match the file's name")
    try:
        return _taken_in(json.loads(header), data[8 + length :], fingerprint)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as e:
        raise KeepsakeDamaged(f"not a keepsake of ours: {type(e).__name__}: {e}") from e


def _taken_in(table: dict[str, Any], payload: np.ndarray, fingerprint: str) -> Keepsake:
    """A header whose hash is right; its writer may still be another program."""
    meta = table.pop("__metadata__")
    if meta["agentmem-keepsake"] != VERSION:
        raise KeepsakeDamaged(f"format version {meta['agentmem-keepsake']!r}, this release reads {VERSION!r}")
    if meta["fingerprint"] != fingerprint:
        raise KeepsakeDamaged("it belongs to another model")
    if xxhash.xxh3_128_hexdigest(payload.data) != meta["sum"]:
        raise KeepsakeDamaged("its bytes are altered")
    arrays, at = {}, 0
    for name, entry in table.items():
        start, stop = entry["data_offsets"]
        if start != at or stop < start:
            raise KeepsakeDamaged(f"offsets of {name} are wrong")
        arrays[name] = Array(entry["dtype"], tuple(entry["shape"]), payload[start:stop])
        at = stop
    if at != len(payload):
        raise KeepsakeDamaged("file size does not match its header")
    return Keepsake(meta["key"], json.loads(meta["about"]), arrays)


def _content(path: Path) -> np.ndarray:
    """The bytes of a regular file: uint8 [n]; neither follows a link nor waits for a pipe's other end."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise KeepsakeDamaged("not a regular file")
        with os.fdopen(os.dup(fd), "rb") as file:
            return np.fromfile(file, np.uint8)
    finally:
        os.close(fd)
