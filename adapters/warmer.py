"""Warming agents while their frameworks make the rest ready."""

from __future__ import annotations

import asyncio

from agentmem.adapters.threads import Threads


class Warmer:
    """Brings the state of agents into RAM, in tasks that nobody waits for."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, agent: str | None) -> None:
        """Begin to warm an agent. A hint: nothing is raised."""
        task = asyncio.get_running_loop().create_task(self._threads.awarm(agent))
        # The loop holds tasks weakly.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
