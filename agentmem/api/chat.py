"""`POST /v1/chat/completions`: one turn of one agent."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from agentmem.api.chat_body import ChatBody
from agentmem.api.errors import envelope
from agentmem.api.exchange import Exchange, Reply, Shown, answered, chat_request, first_event
from agentmem.api.identity import resolve
from agentmem.api.service import Service
from agentmem.api.sse import DONE, KEEP_ALIVE, STREAMED, TurnStream, event
from agentmem.engine.request import Failed, Finished, Logprobs, TokenLogprob
from agentmem.model.calls import CallPart, Part, TextPart


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """One turn. Messages are the whole conversation, or (`agentmem.history`: "server") follow it."""
        service.check_model(body.model)
        tools = body.tooling()
        who = resolve(request.headers, body)
        asked = chat_request(
            who, body, await run_in_threadpool(body.normalised, service.documents(who.namespace)), tools,
            max_tokens=body.reply_limit, stop=list(body.stop or []), n=body.n or 1, top_logprobs=body.ranked,
        )  # fmt: skip
        schema = body.response_format.wanted if body.response_format else None
        turn = await Exchange.begin(service, asked, tools, schema)

        async def answer() -> Response:
            exchange = Exchange(service, turn, await first_event(turn, bool(body.stream)), tools)
            if body.stream:
                return TurnStream(turn, chunks(exchange, body.wants_usage_chunk), exchange.headers)
            replies, usage = await exchange.whole()
            choices = [choice_field(i, reply) for i, reply in enumerate(replies)]
            whole = {**head(service, "chat.completion"), "choices": choices, "usage": usage}
            return JSONResponse(whole, headers=exchange.headers)

        return await answered(request, answer(), turn)

    return router


def head(service: Service, kind: str) -> dict[str, Any]:
    """The fields that every answer and every chunk begins with."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.runtime.model_name,
    }


def choice_field(index: int, reply: Reply) -> dict[str, Any]:
    """A whole reply. One that only calls has no content."""
    calls = {"tool_calls": [call.as_openai() for call in reply.calls]} if reply.calls else {}
    content = reply.text if reply.text or not reply.calls else None
    return {
        "index": index,
        "message": {"role": "assistant", "content": content, "refusal": None, **calls},
        "logprobs": logprobs_field(reply.logprobs),
        "finish_reason": reply.finish,
    }


async def chunks(exchange: Exchange, with_usage: bool) -> AsyncIterator[bytes]:
    """The turn as a stream. An error after its first event travels inside of it."""
    first = head(exchange.service, "chat.completion.chunk")
    replies = range(exchange.turn.request.n)
    called = set()
    for index in replies:
        yield _chunk(first, index, {"role": "assistant", "content": ""})
    async for news in exchange.shown():
        if news is None:
            yield KEEP_ALIVE
        elif isinstance(news, Shown):
            if any(isinstance(part, CallPart) for part in news.parts):
                called.add(news.reply)
            for chunk in _deltas(first, news):
                yield chunk
        elif isinstance(news, Failed):
            yield event(envelope(news.error))
        elif isinstance(news, Finished):
            for index, choice in enumerate(news.choices):
                reason = "tool_calls" if index in called and choice.finish_reason == "stop" else None
                yield _chunk(first, index, {}, reason=reason or _reason(choice.finish_reason))
            if with_usage:
                yield event({**first, "choices": [], "usage": news.usage})
            yield DONE


def _reason(finish: str) -> str:
    return "length" if finish == "cancelled" else finish


def _deltas(first: dict[str, Any], news: Shown) -> list[bytes]:
    """Log probabilities go with the first piece of what is new, which may be a piece of nothing."""
    deltas = [_delta(part) for part in news.parts] or ([{"content": ""}] if news.logprobs else [])
    return [
        _chunk(first, news.reply, delta, news.logprobs if i == 0 else None) for i, delta in enumerate(deltas)
    ]


def _delta(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"content": part.text}
    if isinstance(part, CallPart):
        function = {"name": part.name, "arguments": ""}
        return {
            "tool_calls": [{"index": part.number, "id": part.id, "type": "function", "function": function}]
        }
    return {"tool_calls": [{"index": part.number, "function": {"arguments": part.text}}]}


def _chunk(
    first: dict[str, Any],
    index: int,
    delta: dict[str, Any],
    logprobs: Logprobs | None = None,
    reason: str | None = None,
) -> bytes:
    choice = {
        "index": index, "delta": delta, "logprobs": logprobs_field(logprobs), "finish_reason": reason,
    }  # fmt: skip
    return event({**first, "choices": [choice]})


def logprobs_field(logprobs: Logprobs | None) -> dict[str, Any] | None:
    """A choice's `logprobs` as OpenAI's clients read them; None where they were not asked for."""
    if logprobs is None:
        return None
    content = [
        {**token_field(one), "top_logprobs": [token_field(other) for other in one.top]} for one in logprobs
    ]
    return {"content": content, "refusal": None}


def token_field(one: TokenLogprob) -> dict[str, Any]:
    """One token and its log probability."""
    # `bytes` is what to join: a token may be a part of a character, which its text cannot show.
    return {"token": one.piece.decode(errors="replace"), "logprob": one.logprob, "bytes": list(one.piece)}
