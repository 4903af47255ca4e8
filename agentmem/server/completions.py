"""`POST /v1/chat/completions`: one turn of one agent."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from agentmem.engine.request import ChatRequest, Event, Failed, Finished, Started
from agentmem.server.bodies import ChatBody
from agentmem.server.identity import resolve
from agentmem.server.service import Service
from agentmem.server.sse import TurnStream, chunks, finish_reason, logprobs_field
from agentmem.server.turn import Turn

FIRST_EVENT_S = 2.0
CLIENT_CLOSED_REQUEST = 499

Result = TypeVar("Result")


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """One turn. Messages are the whole conversation, or (`agentmem.history`: "server") follow it."""
        service.check_model(body.model)
        turn = service.begin(chat_request(request, body))
        answer = _stream(service, turn, body) if body.stream else _whole(service, turn)
        try:
            response = await while_connected(request, answer)
        except BaseException:
            turn.cancel()
            raise
        if response is None:
            turn.cancel()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return response

    return router


def chat_request(request: Request, body: ChatBody) -> ChatRequest:
    """The engine's form of a request. Raises BadRequest."""
    who = resolve(request.headers, body)
    return ChatRequest(
        agent=who.agent,
        session=who.session,
        namespace=who.namespace,
        identity_source=who.source,
        messages=[message.normalised() for message in body.messages],
        history=body.agentmem.history,
        persist=body.agentmem.persist,
        reuse=body.agentmem.reuse,
        planner=body.agentmem.planner,
        max_tokens=body.reply_limit,
        stop=list(body.stop or []),
        sampling=body.sampling(),
        n=body.n or 1,
        top_logprobs=body.ranked,
    )


async def _whole(service: Service, turn: Turn) -> Response:
    first = await turn.next()
    if isinstance(first, Failed):
        raise first.error
    end = first if isinstance(first, Finished) else await turn.finish()
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": logprobs_field(choice.logprobs),
            "finish_reason": finish_reason(choice),
        }
        for index, choice in enumerate(end.choices)
    ]
    body = {**_head(service, "chat.completion"), "choices": choices, "usage": end.usage}
    return JSONResponse(body, headers=reuse_headers(service, turn.request, first))


async def _stream(service: Service, turn: Turn, body: ChatBody) -> Response:
    # Headers wait for the first event, so that an error has a status of its own; but not for ever, because
    # clients give up on a connection that says nothing.
    first = await turn.next(FIRST_EVENT_S)
    if isinstance(first, Failed):
        raise first.error
    head = _head(service, "chat.completion.chunk")
    headers = reuse_headers(service, turn.request, first)
    return TurnStream(turn, chunks(turn, first, head, body.wants_usage_chunk), headers)


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.runtime.model_name,
    }


def reuse_headers(service: Service, request: ChatRequest, first: Event | None) -> dict[str, str]:
    """What was remembered, for clients that never ask for usage. Says less while the plan is not made.

    `x-agentmem-store` is there while turns are not kept, and says why.
    """
    headers = {"x-agentmem-agent": request.agent, "x-agentmem-session": request.session}
    if isinstance(first, Started):
        headers["x-agentmem-cache"] = reuse_word(first)
        headers["x-agentmem-cached-tokens"] = str(first.cached_tokens)
        headers["x-agentmem-composed"] = str(first.composed_tokens)
    if service.runtime.degraded:
        headers["x-agentmem-store"] = service.runtime.degraded
    return headers


def reuse_word(started: Started) -> str:
    """`hit` when at least half of the prompt was remembered."""
    if started.cached_tokens == 0:
        return "miss"
    return "hit" if started.cached_tokens * 2 >= started.prompt_tokens else "partial"


async def while_connected(request: Request, answer: Coroutine[Any, Any, Result]) -> Result | None:
    """The answer, or None when the client left before it was there."""
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
