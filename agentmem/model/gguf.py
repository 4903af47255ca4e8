"""Reading the header of a GGUF file: metadata and the type of every tensor, with every length checked.

MLX reads the tensors; it trusts the header, so nothing reaches it that was not checked here.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from agentmem.errors import ModelUnavailable

MAGIC = b"GGUF"
MAX_COUNT = 1 << 24
MAX_STRING = 1 << 26
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class TensorType:
    """One way that GGUF packs numbers: `block` numbers in `size` bytes. `readable`: MLX reads it rightly."""

    name: str
    block: int
    size: int
    readable: bool = False


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4, True),
    1: TensorType("F16", 1, 2, True),
    2: TensorType("Q4_0", 32, 18, True),
    3: TensorType("Q4_1", 32, 20, True),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34, True),
    9: TensorType("Q8_1", 32, 36),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    30: TensorType("BF16", 1, 2, True),
}


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says about itself. `tensors` maps a name to its type's name, e.g. "Q4_1"."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, str]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value whose key is relative to the architecture, e.g. "block_count"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """Like `get`; raises ModelUnavailable where the key is missing."""
        value = self.get(key)
        if value is None:
            raise ModelUnavailable(f"{self.path.name} says nothing about {self.architecture}.{key}")
        return value


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("it ends early")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, limit: int = MAX_COUNT) -> int:
        value = int(self.number("Q"))
        if value > limit or value > self.size:
            raise ValueError(f"a length of {value} is not possible")
        return value

    def string(self) -> str:
        return self.take(self.count(MAX_STRING)).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise ValueError(f"metadata of kind {kind} is not known")
        return self.number(SCALARS[kind])

    def array(self) -> list[Any]:
        kind = self.number("I")
        count = self.count()
        if kind in SCALARS:
            code = SCALARS[kind]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))
        if kind != STRING:
            raise ValueError(f"arrays of kind {kind} are not known")
        return [self.string() for _ in range(count)]

    def tensor(self) -> tuple[str, TensorType, int, int]:
        """Name, type, offset in the data part, bytes."""
        name = self.string()
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = [self.count(1 << 40) for _ in range(dimensions)]
        code, offset = self.number("I"), self.number("Q")
        kind = TENSOR_TYPES.get(code, TensorType(f"number {code}", 1, 0))
        if shape[0] % kind.block:
            raise ValueError(f"rows of tensor {name} are no whole blocks")
        return name, kind, offset, math.prod(shape) // kind.block * kind.size


def read_header(path: Path) -> Header:
    """Read and check the header of the file.

    Raises ModelUnavailable where the file is no sound GGUF file of version 2 or 3, or where it holds
    tensors of a type that MLX cannot read, or reads wrongly (the message names the type).
    """
    try:
        with path.open("rb") as file:
            metadata, tensors = _parse(_Reader(file, path.stat().st_size))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} is not a sound GGUF file: {error}") from error
    refused = Counter(kind.name for kind in tensors.values() if not kind.readable)
    if refused:
        readable = ", ".join(kind.name for kind in TENSOR_TYPES.values() if kind.readable)
        found = ", ".join(f"{name} ({count} tensors)" for name, count in refused.items())
        raise ModelUnavailable(f"{path.name} holds tensors of type {found}; only {readable} can be read")
    return Header(path, metadata, {name: kind.name for name, kind in tensors.items()})


def _parse(reader: _Reader) -> tuple[dict[str, Any], dict[str, TensorType]]:
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not known")
    tensor_count, entries = reader.count(), reader.count()
    metadata = {}
    for _ in range(entries):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
    found = [reader.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"an alignment of {alignment} is not possible")
    start = -(-reader.file.tell() // alignment) * alignment
    for name, _, offset, size in found:
        if start + offset + size > reader.size:
            raise ValueError(f"it ends before the end of tensor {name}")
    return metadata, {name: kind for name, kind, _, _ in found}
