"""OpenBLAS first: a test module that imports mlx before our packages would run on the slow bundled BLAS."""

from __future__ import annotations

from pathlib import Path

import pytest

import agentmem.quant  # noqa: F401
from tests.tiny_model import save_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")
