"""OpenBLAS in front of MLX's Linux CPU backend.

The Linux wheel of MLX bundles the reference BLAS, which is about 90 times slower. Symbols that are already in the
process win, so loading OpenBLAS with RTLD_GLOBAL before `mlx.core` is enough.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys

LIBRARY = "libopenblas.so.0"

_loaded: str | None = None


def wanted() -> bool:
    """True where MLX would run on the bundled reference BLAS: Linux without a CUDA build of MLX."""
    if sys.platform != "linux":
        return False
    try:
        importlib.metadata.version("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def preload() -> str | None:
    """Load OpenBLAS when it is wanted and present; returns the library's name, or None. Safe to call again."""
    global _loaded
    if _loaded is None and wanted():
        try:
            ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            return None
        _loaded = LIBRARY
    return _loaded


def status() -> dict[str, object]:
    """`{"wanted", "loaded"}` for `doctor`."""
    return {"wanted": wanted(), "loaded": _loaded}
