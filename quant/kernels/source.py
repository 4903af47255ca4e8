"""Kernel sources: one body for every device behind a header for each, compiled by MLX when they are first used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx

from agentmem.quant.device import backend

Kernel = Callable[..., list[mx.array]]

THREADS = {
    "cuda": "const unsigned group = blockIdx.x, tid = threadIdx.x, threads = blockDim.x, lane = tid % 32;\n"
    "const unsigned row = lane / 4, col = lane % 4;\n"
    "#define SHARED __shared__\n",
    "metal": "const unsigned group = threadgroup_position_in_grid.x, tid = thread_position_in_threadgroup.x;\n"
    "const unsigned threads = threads_per_threadgroup.x, lane = tid % 32, row = row_of(lane), col = col_of(lane);\n"
    "#define SHARED threadgroup\n",
}
"""Where a thread is. Metal gives a kernel only what its source names, so these are text of the body, not of a header."""


def text(name: str) -> str:
    """A source file of this folder without comments and indents: MLX hashes a kernel's whole source with every call."""
    lines = resources.files(__package__).joinpath(name).read_text().splitlines()
    bare = (re.sub(r"//.*", "", line).strip() for line in lines)
    return "\n".join(line for line in bare if line) + "\n"


def _included(name: str) -> str:
    """The same by its place, which is quicker to hash; CUDA's compiler reads files, Metal's does not.

    The digest is for MLX, which keeps on disk what it has compiled: another content must be another source.
    """
    path = resources.files(__package__).joinpath(name)
    whole = text(name)
    if not isinstance(path, Path) or '"' in str(path):
        return whole
    return f'// {hashlib.sha256(whole.encode()).hexdigest()[:16]}\n#include "{path}"\n'


def sources(device: str, files: Sequence[str], body: str) -> tuple[str, str]:
    """(header, body) of a kernel whose functions are in `files`, for `metal` or `cuda`."""
    part = _included if device == "cuda" else text
    return "".join(part(name) for name in (f"{device}.h", "elements.h", *files)), THREADS[device] + body


@cache
def kernel(
    name: str, files: Sequence[str], body: str, inputs: Sequence[str], outputs: Sequence[str]
) -> Kernel:
    """A kernel of this device whose functions are in `files`; `body` sees `group`, `tid`, `threads`, `lane`, `row`, `col`."""
    fast: Any = mx.fast
    device = "metal" if backend() == "metal" else "cuda"
    make = fast.metal_kernel if device == "metal" else fast.cuda_kernel
    header, source = sources(device, files, body)
    made: Kernel = make(
        name=name, input_names=list(inputs), output_names=list(outputs), source=source, header=header
    )
    return made
