"""A folder for a store, the store in it, and a small geometry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.store import Store
from tests.blockpool.layout import geometry
from tests.blockpool.stores import FINGERPRINT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir(mode=0o700)
    return tmp_path / "store"


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[[], Store]]:
    """Opens the store again and again, one at a time, as one daemon after the other does."""
    stores: list[Store] = []

    def run(**options: Any) -> Store:
        if stores:
            stores.pop().close()
        stores.append(Store(folder, FINGERPRINT, **options))
        return stores[0]

    yield run
    for store in stores:
        store.close()


@pytest.fixture
def g() -> Geometry:
    return geometry()
