"""The attention paths of this device, fastest first."""

from __future__ import annotations

from agentmem.quant import direct, gather
from agentmem.quant.attention import Path, reference_path
from agentmem.quant.rows import RowCodec

PATHS: dict[str, Path] = {
    "gathered": gather.gathered_path,
    "direct": direct.direct_path,
    "reference": reference_path,
}
LONGEST = {"direct": direct.LONGEST}
"""The longest chunk that a path serves itself; longer ones it hands to the reference path."""
SUPPORTED = {"gathered": gather.supported, "direct": direct.supported}


def candidates(codec: RowCodec) -> dict[str, Path]:
    """The paths that can serve this layer here; the self-test decides which may."""
    return {name: path for name, path in PATHS.items() if name not in SUPPORTED or SUPPORTED[name](codec)}


def chosen(result: dict[str, object]) -> Path:
    """The first path that a self-test's result admits."""
    paths = result["paths"]
    assert isinstance(paths, dict)
    return next(PATHS[name] for name, outcome in paths.items() if outcome["ok"])
