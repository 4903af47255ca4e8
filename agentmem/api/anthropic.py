"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's language."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from agentmem.api.anthropic_body import CALL_ID, AnthropicBody, PromptBody
from agentmem.api.errors import ANTHROPIC, AnthropicErrorBody, body_of
from agentmem.api.exchange import Exchange, Reply, Shown, answered, chat_request, first_event
from agentmem.api.identity import resolve
from agentmem.api.service import Service
from agentmem.api.sse import STREAMED, TurnStream, event
from agentmem.engine.request import Failed, Finished, Started
from agentmem.errors import BadRequest
from agentmem.model.calls import ArgumentsPart, CallPart, Part
from agentmem.model.tools import arguments_of

FOREIGN = "claude-"
"""Names that a harness of Anthropic's asks for by itself; whoever points it here wants the model that is here."""
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": AnthropicErrorBody, "description": "an error in Anthropic's shape"}
    for status in ("4XX", "5XX")
}
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def anthropic_router(service: Service) -> APIRouter:
    router = APIRouter(responses=FAILURES)

    @router.post(ANTHROPIC, responses=STREAMED)
    async def create_message(request: Request, body: AnthropicBody) -> Response:
        """One turn. The messages are the whole conversation, or (`agentmem.history`: "server") follow it."""
        _check_model(service, body)
        tools, who = body.tooling(), resolve(request.headers, body)
        messages = await run_in_threadpool(_messages, service, body, who.namespace)
        asked = chat_request(
            who, body, messages, tools, max_tokens=body.max_tokens,
            stop=list(body.stop_sequences or []),
        )  # fmt: skip
        turn = await Exchange.begin(service, asked, tools)

        async def answer() -> Response:
            exchange = Exchange(service, turn, await first_event(turn, bool(body.stream)), tools)
            if body.stream:
                return TurnStream(turn, Writer(exchange).events(), exchange.headers)
            (reply,), usage = await exchange.whole()
            return JSONResponse(_message(service, reply, usage), headers=exchange.headers)

        return await answered(request, answer(), turn)

    @router.post(f"{ANTHROPIC}/count_tokens")
    def count_tokens(request: Request, body: PromptBody) -> dict[str, Any]:
        """Tokens of the prompt that these messages and tools make."""
        _check_model(service, body)
        messages = _messages(service, body, resolve(request.headers, body).namespace)
        return {"input_tokens": service.runtime.count(messages, body.tooling().tools or None)}

    return router


def _check_model(service: Service, body: PromptBody) -> None:
    if not (body.model or "").startswith(FOREIGN):
        service.check_model(body.model)


def _messages(service: Service, body: PromptBody, namespace: str) -> list[dict[str, Any]]:
    try:
        return body.normalised(service.documents(namespace))
    except PydanticCustomError as error:
        raise BadRequest(f"messages: {error.message()}", param="messages") from error


def usage_fields(usage: dict[str, Any]) -> dict[str, Any]:
    """The usage in Anthropic's words: what is remembered is not counted as input."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["completion_tokens"],
        "agentmem": usage["agentmem"],
    }


def _head(service: Service) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": service.runtime.model_name,
    }


def _ending(reply: Reply) -> dict[str, Any]:
    reason = "stop_sequence" if reply.stop is not None else REASONS[reply.finish]
    return {"stop_reason": reason, "stop_sequence": reply.stop}


def _message(service: Service, reply: Reply, usage: dict[str, Any]) -> dict[str, Any]:
    content: list[dict[str, Any]] = (
        [{"type": "text", "text": reply.text}] if reply.text or not reply.calls else []
    )
    for call in reply.calls:
        given = _input(call.as_openai())
        content.append({"type": "tool_use", "id": _call_id(call.id), "name": call.name, "input": given})
    return {**_head(service), "content": content, **_ending(reply), "usage": usage_fields(usage)}


def _input(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call; of one that was cut off, its text."""
    try:
        return arguments_of(call)
    except BadRequest:
        return {"partial_json": call["function"]["arguments"]}


def _call_id(ours: str) -> str:
    return CALL_ID + ours.removeprefix("call_")


class Writer:
    """Writes one turn as a stream of events: blocks of content, one after the other."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._open: str | None = None
        self._block = -1

    async def events(self) -> AsyncIterator[bytes]:
        """The stream. An error after its first event travels inside of it."""
        yield self._start()
        async for news in self._exchange.shown():
            if news is None:
                yield _named("ping")
            elif isinstance(news, Shown):
                for part in news.parts:
                    for one in self._part(part):
                        yield one
            elif isinstance(news, Failed):
                yield event(body_of(news.error, ANTHROPIC), "error")
            elif isinstance(news, Finished):
                for one in self._end(news):
                    yield one

    def _start(self) -> bytes:
        first = self._exchange.first
        known = first.cached_tokens if isinstance(first, Started) else 0
        read = first.prompt_tokens - known if isinstance(first, Started) else 0
        usage = {
            "input_tokens": read, "cache_read_input_tokens": known, "cache_creation_input_tokens": 0, "output_tokens": 0,
        }  # fmt: skip
        message = {**_head(self._exchange.service), "content": [], "stop_reason": None, "stop_sequence": None}
        return _named("message_start", message={**message, "usage": usage})

    def _part(self, part: Part) -> list[bytes]:
        if isinstance(part, ArgumentsPart):
            return [self._delta({"type": "input_json_delta", "partial_json": part.text})]
        if isinstance(part, CallPart):
            block = {"type": "tool_use", "id": _call_id(part.id), "name": part.name, "input": {}}
            return self._begin(block)
        opening = self._begin({"type": "text", "text": ""}) if self._open != "text" else []
        return [*opening, self._delta({"type": "text_delta", "text": part.text})]

    def _begin(self, block: dict[str, Any]) -> list[bytes]:
        closing = self._close()
        self._open = block["type"]
        self._block += 1
        return [*closing, _named("content_block_start", index=self._block, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _named("content_block_delta", index=self._block, delta=delta)

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [_named("content_block_stop", index=self._block)]

    def _end(self, end: Finished) -> list[bytes]:
        reply = self._exchange.reply(end.choices[0])
        empty = [] if self._block >= 0 else self._begin({"type": "text", "text": ""})
        return [
            *empty,
            *self._close(),
            _named("message_delta", delta=_ending(reply), usage=usage_fields(end.usage)),
            _named("message_stop"),
        ]


def _named(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
