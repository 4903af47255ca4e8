"""The checks of `doctor`: each looks at one thing, says what it found, and changes nothing."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agentmem
from agentmem.cli.findings import Check
from agentmem.cli.output import format_bytes
from agentmem.cli.protection import check_protection
from agentmem.client import AgentMemClient
from agentmem.daemon import read_record
from agentmem.errors import AgentMemError
from agentmem.home import Home

FREE_DISK_WANTED = 5 * 10**9
HEALTH_TIMEOUT_S = 10.0
OPENBLAS_HINT = (
    "apt install libopenblas0-pthread, or pip install faiss-cpu, which brings one; then restart the daemon"
)


def check_all(home: Home) -> list[Check]:
    """Every check, in the order of how much depends on it."""
    health, daemon = check_daemon(home)
    return [
        check_home(home),
        check_token(home.token),
        *([check_token(home.inference_token)] if home.inference_token.exists() else []),
        check_disk(home),
        *check_protection(home, health),
        daemon,
        check_blas(health),
        *check_health(health),
    ]


def check_home(home: Home) -> Check:
    """The home exists and only its owner can enter it."""
    if not home.root.exists():
        return Check("home", "note", f"{home.root} does not exist yet; the first start makes it")
    mode = stat.S_IMODE(home.root.stat().st_mode)
    if mode & 0o077:
        return Check(
            "home", "warning", f"others may enter {home.root} (mode {mode:04o})", f"chmod 700 {home.root}"
        )
    return Check("home", "ok", f"{home.root} belongs to its owner alone")


def check_token(path: Path) -> Check:
    """A token file is readable by its owner only."""
    name = path.name.replace("-", " ")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return Check(name, "note", "no token yet; the first start makes it")
    if mode & 0o077:
        hint = f"chmod 600 {path}, then agentmem token rotate: it may have been read"
        return Check(name, "warning", f"others may read the token (mode {mode:04o})", hint)
    return Check(name, "ok", "readable by its owner alone")


def check_disk(home: Home) -> Check:
    """There is room for more memory on the home's disk."""
    existing = next(folder for folder in (home.root, *home.root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < FREE_DISK_WANTED:
        hint = "free some space, or move the home with --home or AGENTMEM_HOME"
        return Check("disk", "warning", f"only {format_bytes(free)} free at {existing}", hint)
    return Check("disk", "ok", f"{format_bytes(free)} free")


def check_daemon(home: Home) -> tuple[dict[str, Any], Check]:
    """The daemon's health (empty when nobody answers), and whether it answers."""
    record = read_record(home)
    if record is None:
        return {}, Check("daemon", "note", "not running", "start it with: agentmem up")
    if not record.alive:
        return {}, Check(
            "daemon",
            "note",
            "the last one was killed; every acknowledged turn is on disk",
            "start it with: agentmem up",
        )
    try:
        with AgentMemClient(home=home.root, timeout=HEALTH_TIMEOUT_S) as client:
            health = client.health()
    except AgentMemError as error:
        return {}, Check("daemon", "warning", error.message, f"see agentmem logs; its pid is {record.pid}")
    serves = f"serves {record.model} at {record.url}"
    if record.version != agentmem.__version__:
        versions = f"it is version {record.version}, this command is {agentmem.__version__}"
        return health, Check("daemon", "warning", f"{serves}; {versions}", "agentmem down && agentmem up")
    return health, Check("daemon", "ok", serves)


def check_blas(health: dict[str, Any]) -> Check:
    """A fast BLAS in front of MLX's Linux CPU backend: in the daemon when it runs, else on this machine."""
    blas = health.get("blas") or _local_blas()
    if not blas["wanted"]:
        return Check("blas", "ok", "MLX brings its own fast kernels on this platform")
    if blas["loaded"]:
        return Check("blas", "ok", f"{blas['loaded']} is {'in use' if health else 'installed'}")
    cost = "there is no OpenBLAS: MLX uses a reference BLAS, whose matrix products are about 90 times slower"
    return Check("blas", "warning", cost, OPENBLAS_HINT)


def _local_blas() -> dict[str, Any]:
    """What the next daemon would find, asked of a process of its own."""
    code = "import json; from agentmem.quant import blas; print(json.dumps(blas.status()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    found: dict[str, Any] = (
        json.loads(done.stdout) if done.returncode == 0 else {"wanted": True, "loaded": None}
    )
    return found


def check_health(health: dict[str, Any]) -> Iterator[Check]:
    """What a running daemon says about its attention kernels and its store; nothing when none runs."""
    if "self_test" in health:
        yield _kernels(health["self_test"]["paths"], health["backend"])
    if "kv_verdict" in health:
        yield _format(health["kv_format"], health["kv_verdict"])
    if "store" in health:
        yield _store(health["store"])


def _kernels(paths: dict[str, dict[str, Any]], backend: str) -> Check:
    right = [name for name, result in paths.items() if result["ok"]]
    wrong = [f"{name} (off by {result['error']:.2g})" for name, result in paths.items() if not result["ok"]]
    if not right:
        return Check("kernels", "problem", f"no attention path is right on {backend}: {', '.join(wrong)}")
    if wrong:
        message = f"refused on {backend}: {', '.join(wrong)}; in use: {right[0]}"
        return Check("kernels", "warning", message, "replies are right, and may be slower")
    return Check("kernels", "ok", f"self-test passed on {backend}: {', '.join(right)}")


def _format(name: str, verdict: str) -> Check:
    """What `verify MODEL` found of the KV format in use."""
    if verdict == "ok":
        return Check("kv format", "ok", f"{name}: verified, or 16 bits")
    hint = "agentmem verify MODEL measures what it costs"
    if verdict == "unverified":
        return Check("kv format", "note", f"{name} was never measured with this model", hint)
    return Check("kv format", "warning", f"{name}: {verdict}", f"choose another kv_format; {hint}")


def _store(store: dict[str, Any]) -> Check:
    if store["read_only"]:
        message = f"read-only after an error: {store['problem']}; new turns are not kept"
        return Check("store", "problem", message, "mend the disk, then restart the daemon")
    if store["disk_full"]:
        message = "the disk is full, or less than disk_floor is free: turns are answered and not kept yet"
        return Check("store", "warning", message, "make room: they are written with the next turn")
    if store["quarantined"]:
        message = f"{store['quarantined']} damaged extents are in quarantine; their tokens are read anew"
        return Check("store", "warning", message, "check the disk; agentmem logs says what was wrong")
    return Check("store", "ok", f"{format_bytes(store['extent_bytes'])} in {store['extents']} extents")
