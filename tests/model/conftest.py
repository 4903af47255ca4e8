"""The embedded model, converted once per machine and loaded once per run; whatever needs it counts as slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem.home import Home, default_home
from agentmem.model.loaded import LoadedModel, load


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "embedded" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    return load("embedded", default_home())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh home that shares no models with the machine's own."""
    monkeypatch.delenv("AGENTMEM_MODELS", raising=False)
    return Home(tmp_path / "home").root
