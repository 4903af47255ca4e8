"""One turn between the engine's threads and the event loop."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from agentmem.api.metrics import Metrics
from agentmem.engine.request import ChatRequest, Delta, Event, Failed, Finished, Ticket

if TYPE_CHECKING:
    from agentmem.runtime import Runtime


class Turn:
    """A submitted request and its events, to be read by one task. Leaving it as a context cancels the rest.

    Raises what `Runtime.chat` raises.
    """

    def __init__(self, runtime: Runtime, request: ChatRequest, metrics: Metrics) -> None:
        self.request = request
        self._metrics = metrics
        self._arrived = time.perf_counter()
        self._spoke = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.ticket: Ticket = runtime.chat(request, self._on_event)

    def _on_event(self, event: Event) -> None:
        """Called by the engine's threads. Counts here, so that turns whose client left count too."""
        if isinstance(event, Delta) and not self._spoke:
            self._spoke = True
            self._metrics.first_text(time.perf_counter() - self._arrived)
        elif isinstance(event, Finished):
            self._metrics.finished(event.usage)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self, timeout: float | None = None) -> Event | None:
        """The next event; None when none came within `timeout` seconds."""
        try:
            return await asyncio.wait_for(self._events.get(), timeout)
        except TimeoutError:
            return None

    async def finish(self) -> Finished:
        """The end of the turn. Raises the error it failed with."""
        while True:
            event = await self.next()
            if isinstance(event, Finished):
                return event
            if isinstance(event, Failed):
                raise event.error

    def cancel(self) -> None:
        """Nobody waits for the rest: stop decoding soon. Harmless after the end."""
        self.ticket.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
