"""OpenBLAS first: a test module that imports mlx before our packages would run on the slow bundled BLAS."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
import pytest

# Converted models, and what formats measure of models, are kept between test runs.
os.environ.setdefault("AGENTMEM_MODELS", f"{platformdirs.user_cache_dir('agentmem-tests', False)}/models")
# Matrices of tiny models are too small to share: a second thread only waits, and burns as much time again.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import agentmem.quant  # noqa: F401
from tests.tiny_model import save_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: the processes that share the tests then end together. `slow(minutes=...)` says about how long."""

    def minutes(item: pytest.Item) -> float:
        slow = item.get_closest_marker("slow")
        return slow.kwargs.get("minutes", 0.1) if slow is not None else 0.0

    items.sort(key=minutes, reverse=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")
