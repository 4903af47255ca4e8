"""Real daemons for the frameworks' real agents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.conftest import Daemon, Start, daemon, environment, launch, start, tiny_daemon

__all__ = ["daemon", "environment", "launch", "start", "tiny_daemon"]


@pytest.fixture
def own_daemon(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One that nobody else speaks to."""
    own = start(tmp_path_factory.mktemp("own") / "home")
    yield own
    own.stop()
