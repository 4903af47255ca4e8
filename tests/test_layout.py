"""The shape of the source tree: which room may import which, and what may not be there at all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "agentmem.quant": ROOT / "quant",
    "agentmem.blockpool": ROOT / "blockpool",
    "agentmem.adapters": ROOT / "adapters",
    "agentmem.cli": ROOT / "cli",
    "agentmem": ROOT / "agentmem",
}
CLIENT_SIDE = {
    "agentmem", "agentmem.async_client", "agentmem.client", "agentmem.daemon", "agentmem.errors", "agentmem.home",
    "agentmem.local_socket", "agentmem.plugins",
    "agentmem.settings", "agentmem.streams", "agentmem.tokens", "agentmem.transfers", "agentmem.wire",
}  # fmt: skip
# What each room may import of us, besides itself.
ALLOWED = {
    "agentmem.quant": set[str](),
    "agentmem.blockpool": {"agentmem.quant", "agentmem.errors"},
    "agentmem.model": {"agentmem.quant", "agentmem.errors", "agentmem.home"},
    "agentmem.compose": {"agentmem.quant", "agentmem.blockpool", "agentmem.model", "agentmem.errors"},
    "agentmem.episode": {
        "agentmem.quant", "agentmem.blockpool", "agentmem.model", "agentmem.errors", "agentmem.home",
    },
    "agentmem.engine": {
        "agentmem.quant", "agentmem.blockpool", "agentmem.model", "agentmem.compose", "agentmem.episode",
        "agentmem.errors",
    },
    "agentmem.api": {
        *CLIENT_SIDE, "agentmem.runtime", "agentmem.engine.request", "agentmem.compose.reuse", "agentmem.episode.policy",
        "agentmem.model.calls", "agentmem.model.tools",
    },
    "agentmem.server": {*CLIENT_SIDE, "agentmem.api", "agentmem.runtime"},
    "agentmem.bench": {
        *CLIENT_SIDE, "agentmem.quant", "agentmem.blockpool", "agentmem.model", "agentmem.engine",
        "agentmem.compose", "agentmem.episode", "agentmem.runtime",
    },
    "agentmem.adapters": CLIENT_SIDE,
    "agentmem.cli": {*CLIENT_SIDE, "agentmem.adapters", "agentmem.compose.reuse"},
    "agentmem.runtime": {
        "agentmem", "agentmem.quant", "agentmem.blockpool", "agentmem.model", "agentmem.engine",
        "agentmem.compose", "agentmem.episode", "agentmem.errors", "agentmem.settings",
    },
}  # fmt: skip
LIBRARIES_OF_QUANT = {"mlx", "numpy"}
UNSAFE = re.compile(
    r"\b(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal|torch\.load|allow_pickle=True|eval\(|exec\()"
)
SOURCES = sorted(p for folder in set(FOLDERS.values()) for p in folder.rglob("*.py"))


def module_of(path: Path) -> str:
    """Import name of a source file."""
    package, folder = next((p, f) for p, f in FOLDERS.items() if path.is_relative_to(f))
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *(p for p in parts if p != "__init__")])


def imports_of(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in inner if name in MODULES)


MODULES = {module_of(p) for p in SOURCES}


def room_of(module: str) -> str | None:
    """The room whose rule a module follows: the longest that has one."""
    names = [module.rsplit(".", i)[0] for i in range(module.count(".") + 1)]
    return next((n for n in names if n in ALLOWED), None)


def within(name: str, rooms: set[str]) -> bool:
    return any(name == r or (r != "agentmem" and name.startswith(f"{r}.")) for r in rooms)


def ours(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    names = {n for n in imports_of(path) if n == "agentmem" or n.startswith("agentmem.")}
    return {n if n in MODULES else n.rsplit(".", 1)[0] for n in names}


def test_every_room_is_looked_at() -> None:
    rooms = {room_of(m) for m in MODULES}
    assert rooms - {None} == set(ALLOWED)
    assert {m for m in MODULES if room_of(m) is None} == CLIENT_SIDE
    assert len(SOURCES) > 60


def wrong_imports(path: Path) -> set[str]:
    """What a file imports that its room may not."""
    room = room_of(module_of(path))
    allowed = CLIENT_SIDE if room is None else ALLOWED[room] | {room}
    bare_package = {n for n in ours(path) if n == "agentmem"} if room is not None else set()
    return {n for n in ours(path) - bare_package if not within(n, allowed)}


def test_imports_point_downwards() -> None:
    assert {str(p): wrong for p in SOURCES if (wrong := wrong_imports(p))} == {}


def test_quant_needs_mlx_and_numpy_only() -> None:
    standard = sys.stdlib_module_names
    for path in (ROOT / "quant").rglob("*.py"):
        tops = {n.split(".")[0] for n in imports_of(path)} - {"agentmem"}
        assert {t for t in tops if t not in standard} <= LIBRARIES_OF_QUANT, path


def test_a_wrong_import_would_be_found() -> None:
    assert not within("agentmem.engine.engine", ALLOWED["agentmem.cli"])
    assert not within("agentmem.blockpool.pool", ALLOWED["agentmem.quant"])
    assert not within("agentmem.runtime", CLIENT_SIDE)
    assert within("agentmem.quant.rows", ALLOWED["agentmem.blockpool"])


@pytest.mark.parametrize(
    "module",
    [
        "agentmem",
        "agentmem.adapters",
        "agentmem.adapters.agent_framework",
        "agentmem.adapters.openai_agents",
        "agentmem.client",
        "agentmem.cli.main",
        "agentmem.settings",
    ],
)
def test_the_client_side_runs_without_mlx(module: str) -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('mlx', 'mlx_lm', 'transformers', 'torch'):\n"
        "            raise ImportError('no ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"import {module}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels of MLX bundle a slow BLAS")
@pytest.mark.parametrize(
    "package", ["quant.rows", "blockpool.arena", "model.random", "engine.engine", "runtime"]
)
def test_openblas_is_loaded_before_mlx(package: str) -> None:
    """Whichever package of ours comes first; a library that is loaded later changes nothing."""
    code = (
        "import sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mlx.core':\n"
        "            in_memory = 'openblas' in open('/proc/self/maps').read()\n"
        "            found = sys.modules['agentmem.quant.blas'].preload()\n"
        "            assert in_memory == (found is not None), (in_memory, found)\n"
        "            sys.exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import agentmem.{package}\n"
        "sys.exit('mlx was never imported')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_files_stay_short() -> None:
    lengths = {str(p): len(p.read_text().splitlines()) for p in SOURCES}
    assert {path: n for path, n in lengths.items() if n >= 400} == {}


def test_nothing_that_runs_what_it_reads() -> None:
    texts = {str(p): re.sub(r"mx\.eval\(|re\.compile\(|\.eval\(\)", "", p.read_text()) for p in SOURCES}
    assert {path: found for path, text in texts.items() if (found := UNSAFE.findall(text))} == {}


def test_unsafe_code_would_be_found() -> None:
    for line in ("import pickle", "torch.load(path)", "np.load(p, allow_pickle=True)", "eval(text)"):
        assert UNSAFE.search(line), line
