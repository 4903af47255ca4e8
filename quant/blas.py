"""OpenBLAS in front of MLX's Linux CPU backend.

The Linux wheel of MLX bundles the reference BLAS, whose matrix products take about 90 times as long. Symbols that are already in
the process win, so loading OpenBLAS with RTLD_GLOBAL before `mlx.core` is enough. The system's library is preferred; the
wheel of `faiss-cpu` (MIT) carries one with plain symbol names too, and is never imported.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import sys
from pathlib import Path

SYSTEM = "libopenblas.so.0"
WHEEL = "faiss"
WHEEL_LIBRARIES = ("libquadmath", "libgfortran", "libgomp")

log = logging.getLogger(__name__)

_loaded: str | None = None
_late = False


def wanted() -> bool:
    """True where MLX would run on the bundled reference BLAS: Linux with the CPU build of MLX."""
    if sys.platform != "linux":
        return False
    try:
        importlib.metadata.version("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def preload() -> str | None:
    """Load OpenBLAS when it is wanted and present; returns the library's name, or None. Safe to call again."""
    global _loaded, _late
    if _loaded is None and wanted():
        _late = "mlx.core" in sys.modules
        if _late:
            log.warning(
                "mlx was imported before agentmem: prefill runs on the slow bundled BLAS in this process"
            )
        _loaded = _load_system() or _load_wheel()
    return _loaded


def _load_system() -> str | None:
    try:
        ctypes.CDLL(SYSTEM, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return SYSTEM


def _load_wheel() -> str | None:
    """The library inside an installed faiss-cpu wheel; what it links against is loaded first."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent.parent / "faiss_cpu.libs"
    blas = next(iter(sorted(folder.glob("libopenblas*"))), None)
    if blas is None:
        return None
    try:
        for name in WHEEL_LIBRARIES:
            for path in sorted(folder.glob(f"{name}*")):
                ctypes.CDLL(str(path))
        ctypes.CDLL(str(blas), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return blas.name


def status() -> dict[str, object]:
    """`{"wanted", "loaded", "late"}` for `doctor`."""
    return {"wanted": wanted(), "loaded": _loaded, "late": _late}
