"""One home for all tests of a folder, made once; each test damages a copy."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.home import Expected, ask_all, copy_of, make_home


@pytest.fixture(scope="package")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that nobody may touch."""
    folder = tmp_path_factory.mktemp("original")
    return make_home(folder / "home", folder / "crashed")


@pytest.fixture(scope="package")
def crashed(original: Path) -> Path:
    """The same home as a killed process would have left it, with a write-ahead log; nobody may touch it."""
    return original.with_name("crashed")


@pytest.fixture(scope="package")
def expected(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What the agents of that home say next."""
    return ask_all(copy_of(original, tmp_path_factory.mktemp("expected") / "home"))


@pytest.fixture
def home(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return copy_of(original, tmp_path / "home")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes; needs the right to mount one."""
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
