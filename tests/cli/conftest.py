"""A home per test, and real daemons that several tests share: on the tiny model, and on the embedded one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import pytest

from agentmem.home import Home
from tests.cli.cli_line import invoke


@pytest.fixture(scope="session")
def models() -> Path:
    """Where converted models are kept between test runs, so that the embedded one is converted once."""
    named = os.environ.get("AGENTMEM_MODELS")
    return Path(named) if named else Path(platformdirs.user_cache_dir("agentmem-tests", False)) / "models"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """Settings of the person who runs the tests stay outside."""
    for name in [name for name in os.environ if name.startswith("AGENTMEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTMEM_MODELS", str(models))
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A fresh home; a daemon that the test started on it is stopped."""
    folder = Home(tmp_path / "home")
    monkeypatch.setenv("AGENTMEM_HOME", str(folder.root))
    yield folder
    invoke("down")


@contextmanager
def served(root: Path, models: Path, *flags: str) -> Iterator[Home]:
    """The home of a daemon, which is stopped in the end."""
    folder = Home(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTMEM_MODELS", str(models))
        patch.setenv("AGENTMEM_HOME", str(root))
        result = invoke("up", "--port", "0", "--json", *flags)
        assert result.exit_code == 0, result.stderr
    try:
        yield folder
    finally:
        invoke("--home", str(root), "down")


@pytest.fixture(scope="package")
def daemon_home(tmp_path_factory: pytest.TempPathFactory, models: Path, tiny_model: Path) -> Iterator[Home]:
    """The home of the daemon that most tests share."""
    flags = ("--model", str(tiny_model), "--ram-budget", "64MiB")
    with served(tmp_path_factory.mktemp("daemon") / "home", models, *flags) as home:
        yield home


@pytest.fixture(scope="module")
def embedded_home(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Home]:
    """The home of a daemon with default settings; it takes memory, so it ends with the module."""
    with served(tmp_path_factory.mktemp("embedded") / "home", models) as home:
        yield home


@pytest.fixture
def daemon(daemon_home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The shared daemon's home, made the default home."""
    monkeypatch.setenv("AGENTMEM_HOME", str(daemon_home.root))
    return daemon_home
