"""Real daemons for the frameworks' real agents."""

from __future__ import annotations

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
