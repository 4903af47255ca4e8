"""A home per test, and one real daemon on the embedded model for all tests that only need some daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A fresh home; a daemon that the test started on it is stopped."""
    folder = Home(tmp_path / "home")
    monkeypatch.setenv("AGENTMEM_HOME", str(folder.root))
    yield folder
    invoke("down")


@pytest.fixture(scope="session")
def daemon_home(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Home]:
    """The home of the daemon that the session shares."""
    folder = Home(tmp_path_factory.mktemp("daemon") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTMEM_MODELS", str(models))
        patch.setenv("AGENTMEM_HOME", str(folder.root))
        result = invoke("up", "--port", "0", "--json")
        assert result.exit_code == 0, result.stderr
        yield folder
        invoke("down")


@pytest.fixture
def daemon(daemon_home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The shared daemon's home, made the default home."""
    monkeypatch.setenv("AGENTMEM_HOME", str(daemon_home.root))
    return daemon_home
