"""Server-sent events: how one looks on the wire, and a response of them that ends its turn when the client leaves."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from agentmem.api.turn import Turn

KEEP_ALIVE_S = 5.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What the schema says of routes that answer whole or as a stream."""


class TurnStream(StreamingResponse):
    """Streams a turn, and cancels it when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, turn: Turn, chunks: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(chunks, headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._turn:
            await super().__call__(scope, receive, send)


def event(data: dict[str, Any], kind: str | None = None) -> bytes:
    """One event; `kind` is its name, where the API has names."""
    # ASCII only: some clients take U+2028 or U+0085 in the text for the end of the line.
    text = json.dumps(data, separators=(",", ":")).encode("ascii")
    return (b"event: " + kind.encode("ascii") + b"\n" if kind else b"") + b"data: " + text + b"\n\n"
