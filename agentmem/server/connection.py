"""One connection: heads that come in time and within bounds, and refusals in the API's envelope even below HTTP."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from agentmem.api.errors import HeadTooLarge, TooSlow, error_response
from agentmem.errors import AgentMemError, BadRequest

HEAD_TOO_LARGE = 431


class Connection(H11Protocol):
    """Closes where nothing whole arrives for `timeout` seconds: the server underneath would wait for ever.

    The timer runs while a head is awaited, and while the rest of a refused body is thrown away. Bodies that
    somebody reads have a limit of their own.
    """

    timeout = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._nobody_reads():
            self._start_timer()
        super().data_received(data)
        if not self._nobody_reads():
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        # Called while the parser's error is handled; it alone knows that a head was too large.
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) == HEAD_TOO_LARGE:
            self._refuse(HeadTooLarge("the head of the request is too large"))
        else:
            self._refuse(BadRequest("this is no valid HTTP request", code="invalid_http"))

    def _nobody_reads(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        # One that runs goes on: a byte now and then must not win time.
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self.timeout, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if not self._refused and self.conn.trailing_data[0]:
            self._refuse(TooSlow("the head of the request did not arrive in time"))
        else:
            self.transport.close()

    def _refuse(self, error: AgentMemError) -> None:
        """Answer, when an answer still fits into the conversation, and close once the client has."""
        self._refused = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            if self.cycle is not None:
                self.cycle.disconnected = True  # whoever still works on an answer has nobody to give it to
            response = error_response(error, "")
            headers = [*response.raw_headers, (b"connection", b"close")]
            reason = STATUS_PHRASES[error.status]
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            # To close while bytes are unread would reset the connection, and the answer would be lost.
            self.transport.write_eof()
            self._start_timer()
        else:
            self.transport.close()


def connection_class(timeout: float) -> type[Connection]:
    """Connections that wait `timeout` seconds at most."""
    return type("TimedConnection", (Connection,), {"timeout": timeout})
