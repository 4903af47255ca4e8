"""Real daemons for the frameworks' real agents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentmem.client import AgentMemClient
from tests.server.conftest import (
    Daemon,
    daemon,
    embedded_daemon,
    environment,
    launch,
    start,
    tiny_daemon,
)

__all__ = ["Daemon", "daemon", "embedded_daemon", "environment", "launch", "start", "tiny_daemon"]


@pytest.fixture
def client(daemon: Daemon) -> Iterator[AgentMemClient]:
    """A client of a daemon that knows nobody."""
    with AgentMemClient(home=daemon.home) as client:
        for info in client.agents():
            client.forget(info["agent"])
        yield client
