"""The embedded model, converted once per machine and loaded once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem.home import Home, default_home
from agentmem.model.loaded import LoadedModel, load


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    return load("embedded", default_home())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh home that shares no models with the machine's own."""
    monkeypatch.delenv("AGENTMEM_MODELS", raising=False)
    return Home(tmp_path / "home").root
