"""Sources of the kernels, as text: what MLX and Metal's language ask of them, on machines that cannot compile for Metal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import agentmem.quant
from agentmem.quant import gather
from agentmem.quant.kernels import decode
from agentmem.quant.kernels.source import sources, text

QUANT = Path(agentmem.quant.__file__).parent
KERNELS = {decode.FILES: decode._BODY, decode.COMBINE: decode._COMBINE, ("gather.h",): gather._BODY}
SHARED = {"cuda.h", "metal.h", "elements.h"}

ATTRIBUTE = re.compile(
    r"\b(?:dispatch_\w+_per_threadgroup|grid_origin|grid_size|thread_execution_width|threadgroups_per_grid"
    r"|(?:quad|simd)groups?_(?:index_in|per)_threadgroup|thread_index_in_\w+|thread(?:group)?_position_in_\w+"
    r"|threads_per_(?:grid|simdgroup|threadgroup))\b"
)
"""Of a Metal kernel, by the names of MLX's metal_kernel."""
RESERVED = re.compile(r"\b(?:thread|threadgroup|device|constant|half|kernel|vertex|fragment)\b")
"""Keywords of Metal's language; the bodies have macros for what they need of them."""


def test_every_kernel_is_here() -> None:
    assert {p.name for p in (QUANT / "kernels").glob("*.h")} - SHARED == {
        name for files in KERNELS for name in files
    }
    assert [p.name for p in QUANT.rglob("*.py") if "metal_kernel" in p.read_text()] == ["source.py"]


@pytest.mark.parametrize("files", KERNELS, ids=" ".join)
def test_metal_attributes_are_named_in_the_body(files: tuple[str, ...]) -> None:
    """MLX declares those that it finds in the body: a macro of the header would name what the kernel has not got."""
    header, body = sources("metal", files, KERNELS[files])
    assert ATTRIBUTE.findall(header) == []
    assert set(ATTRIBUTE.findall(body)) == {
        "threadgroup_position_in_grid", "thread_position_in_threadgroup", "threads_per_threadgroup"
    }  # fmt: skip


@pytest.mark.parametrize("files", KERNELS, ids=" ".join)
def test_bodies_name_nothing_as_metal_does(files: tuple[str, ...]) -> None:
    assert RESERVED.findall("".join(map(text, ("elements.h", *files))) + KERNELS[files]) == []
