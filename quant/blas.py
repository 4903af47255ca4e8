"""OpenBLAS in front of MLX's Linux CPU backend.

The Linux wheel of MLX bundles the reference BLAS, whose matrix products take about 90 times as long. Symbols that are already in
the process win, so loading OpenBLAS with RTLD_GLOBAL before `mlx.core` is enough. The system's library is preferred; the
wheel of `faiss-cpu` (MIT) carries one with plain symbol names too, and is never imported.

OpenBLAS chooses its kernels by the processor's model number, and the oldest for numbers that it does not know: 0.3.21 (Debian 12)
runs Xeons of the fifth generation on SSE3. It chooses while it loads, so such a library is loaded again, with a better choice.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SYSTEM = "libopenblas.so.0"
WHEEL = "faiss"
WHEEL_LIBRARIES = ("libquadmath", "libgfortran", "libgomp")

CORE = "OPENBLAS_CORETYPE"
FALLBACKS = ("Prescott", "Barcelona")
"""Whose kernels OpenBLAS takes for an Intel or AMD processor that is newer than it: a fifth of the speed of those below."""
KERNELS = {
    "SkylakeX": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "Haswell": {"avx2", "fma"},
}
"""Kernels that every OpenBLAS with AVX has, the fastest first, and what a processor must offer for them."""
WAIT, SHORTEST = "OPENBLAS_THREAD_TIMEOUT", "4"
"""How long its threads spin before they sleep, as a power of two in cycles. Its own 2^26 is longer than most pauses between
products: on two cores that was a third of a prompt's CPU time, taken from everybody else, and no time won.
"""

log = logging.getLogger(__name__)

_loaded: str | None = None
_kernels: str | None = None
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
        _load(SYSTEM)
    except OSError:
        return None
    return SYSTEM


def _load(path: str) -> None:
    """Load an OpenBLAS for all to see. Raises OSError when that is not to be."""
    global _kernels
    with _environment(WAIT, SHORTEST):
        library = ctypes.CDLL(path)  # not for all yet: it may have to go again
        _kernels, better = _core(library), _better_kernels()
        if _kernels in FALLBACKS and better is not None and CORE not in os.environ:
            dlclose = ctypes.CDLL(None).dlclose
            dlclose(ctypes.c_void_p(library._handle))
            with _environment(CORE, better):
                library = ctypes.CDLL(path)
            _kernels = _core(library)
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _core(library: ctypes.CDLL) -> str | None:
    """The processor whose kernels were taken; None when the library does not say."""
    try:
        name = library.openblas_get_corename
    except AttributeError:
        return None
    name.restype = ctypes.c_char_p
    return str(name().decode())


def _better_kernels() -> str | None:
    """The fastest kernels that this processor can run; None for one without AVX2, or where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return next((kernels for kernels, needs in KERNELS.items() if needs <= flags), None)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable for a while, unless it is set; others who read it, NumPy's OpenBLAS for one, must not see it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


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
        _load(str(blas))
    except OSError:
        return None
    return blas.name


def status() -> dict[str, object]:
    """`{"wanted", "loaded", "kernels", "late"}` for `doctor`; `kernels` names the processor that they were written for."""
    return {"wanted": wanted(), "loaded": _loaded, "kernels": _kernels, "late": _late}
