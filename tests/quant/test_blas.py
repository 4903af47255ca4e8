"""OpenBLAS runs on kernels that suit the processor and waits asleep. It reads that while it loads: processes of their own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from agentmem.quant import blas

pytestmark = [
    pytest.mark.skipif(blas.status()["loaded"] is None, reason="OpenBLAS is neither needed nor there"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="about processors of this kind"),
]
LOAD = f"""
import ctypes, importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("blas", {blas.__file__!r})
blas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blas)
"""
OUTCOME = """
def product():
    a, b, c = (ctypes.c_float * 4)(1, 2, 3, 4), (ctypes.c_float * 4)(5, 6, 7, 8), (ctypes.c_float * 4)()
    one, none = ctypes.c_float(1), ctypes.c_float(0)
    ctypes.CDLL(None).cblas_sgemm(101, 111, 111, 2, 2, 2, one, a, 2, b, 2, none, c, 2)
    return list(c)
blas.preload()
said = {**blas.status(), "better": blas._better_kernels(), "product": product()}
said["wait"] = ctypes.CDLL(None).openblas_thread_timeout()
said["told"] = [name for name in os.environ if name.startswith("OPENBLAS")]
print(json.dumps(said))
"""


def outcome(change: str = "", **environment: str) -> dict[str, Any]:
    """What a process says that loads OpenBLAS after `change`; other libraries of it find the symbols."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD + change + OUTCOME],
        env=plain | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = dict(json.loads(done.stdout))
    assert said["product"] == [19, 22, 43, 50]
    return said


def test_no_processor_runs_on_kernels_far_below_it() -> None:
    said = outcome()
    assert said["better"] is None or said["kernels"] not in blas.FALLBACKS
    assert said["told"] == [], "another OpenBLAS of this process would follow"


def test_a_fallback_is_replaced_by_the_first_kernels_that_the_processor_can_run() -> None:
    chosen = outcome()["kernels"]
    kernels = {"Nothing": {"no such flag"}, "Nehalem": {"sse4_2"}, "Haswell": {"avx2"}}
    said = outcome(f"blas.FALLBACKS, blas.KERNELS = [*blas.FALLBACKS, {chosen!r}], {kernels}\n")
    assert said["kernels"] == "Nehalem"
    assert said["told"] == []


def test_who_chose_kernels_gets_them() -> None:
    said = outcome(OPENBLAS_CORETYPE="Prescott")
    assert said["kernels"] == "Prescott"
    assert said["told"] == ["OPENBLAS_CORETYPE"]


def test_threads_that_wait_for_products_sleep() -> None:
    assert outcome()["wait"] == 4
    assert outcome(OPENBLAS_THREAD_TIMEOUT="9")["wait"] == 9
