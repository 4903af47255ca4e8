"""A turn as server-sent events, in the chunks that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from agentmem.engine.request import Choice, Delta, Event, Failed, Finished, Logprobs, TokenLogprob
from agentmem.server.errors import envelope
from agentmem.server.turn import Turn

KEEP_ALIVE_S = 5.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class TurnStream(StreamingResponse):
    """Streams a turn, and cancels it when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, turn: Turn, chunks: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(chunks, headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._turn:
            await super().__call__(scope, receive, send)


async def chunks(
    turn: Turn, first: Event | None, head: dict[str, Any], with_usage: bool
) -> AsyncIterator[bytes]:
    """The events of a turn whose `first` event (if any came yet) was read already.

    `head` holds the fields that every chunk repeats. An error after this point travels inside the stream.
    """
    for index in range(turn.request.n):
        yield _chunk(head, index, {"role": "assistant", "content": ""})
    event = first
    while True:
        if event is None:
            yield KEEP_ALIVE
        elif isinstance(event, Delta):
            yield _chunk(head, event.index, {"content": event.text}, event.logprobs)
        elif isinstance(event, Finished):
            for index, choice in enumerate(event.choices):
                yield _chunk(head, index, {}, reason=finish_reason(choice))
            if with_usage:
                yield _event({**head, "choices": [], "usage": event.usage})
            yield DONE
            return
        elif isinstance(event, Failed):
            yield _event(envelope(event.error))
            return
        event = await turn.next(KEEP_ALIVE_S)


def finish_reason(choice: Choice) -> str:
    """In OpenAI's words: a cancelled reply is one that was cut short."""
    return "length" if choice.finish_reason == "cancelled" else choice.finish_reason


def logprobs_field(logprobs: Logprobs | None) -> dict[str, Any] | None:
    """A choice's `logprobs` as OpenAI's clients read them; None where they were not asked for."""
    if logprobs is None:
        return None
    content = [{**_token(one), "top_logprobs": [_token(other) for other in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


def _token(one: TokenLogprob) -> dict[str, Any]:
    # `bytes` is what to join: a token may be a part of a character, which its text cannot show.
    return {"token": one.piece.decode(errors="replace"), "logprob": one.logprob, "bytes": list(one.piece)}


def _chunk(
    head: dict[str, Any],
    index: int,
    delta: dict[str, str],
    logprobs: Logprobs | None = None,
    reason: str | None = None,
) -> bytes:
    choice = {
        "index": index, "delta": delta, "logprobs": logprobs_field(logprobs), "finish_reason": reason,
    }  # fmt: skip
    return _event({**head, "choices": [choice]})


def _event(data: dict[str, Any]) -> bytes:
    # ASCII only: some clients take U+2028 or U+0085 in the text for the end of the line.
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"
