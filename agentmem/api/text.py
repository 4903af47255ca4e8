"""`POST /v1/completions`: text goes on where a prompt ends, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, StrictBool, StrictInt, model_validator
from starlette.responses import JSONResponse, Response

from agentmem.api.errors import envelope, unsupported
from agentmem.api.exchange import (
    Exchange,
    Reply,
    Shown,
    answered,
    chat_request,
    finish_reason,
    first_event,
)
from agentmem.api.fields import MAX_COUNT, MAX_STOPS, SampledBody, Stops, StreamOptions, Tokens
from agentmem.api.identity import Identity, resolve
from agentmem.api.message import Text
from agentmem.api.service import Service
from agentmem.api.sse import DONE, KEEP_ALIVE, STREAMED, TurnStream, event
from agentmem.api.tools import Tools
from agentmem.engine.request import MAX_CHOICES, ChatRequest, Failed, Finished, Logprobs
from agentmem.model.calls import TextPart

MAX_PROMPTS = 16
DEFAULT_TOKENS = 16
COUNTED = ("prompt_tokens", "completion_tokens", "total_tokens")
TokenId = Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)]
Prompt = Text | list[TokenId]


class TextBody(SampledBody):
    """One prompt, or several that are independent of each other: texts, or token ids of this model."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    stop: Stops = Field(default=None, max_length=MAX_STOPS)
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None
    echo: StrictBool = False
    suffix: Text | None = None

    @model_validator(mode="after")
    def _possible(self) -> TextBody:
        if self.suffix:
            raise unsupported("suffix is not supported")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of is not supported; ask for n replies and choose")
        if self.echo and (self.logprobs is not None or not all(isinstance(p, str) for p in self.prompts)):
            raise unsupported("echo is supported for texts without logprobs")
        if self.stream and len(self.prompts) > 1:
            raise unsupported("one prompt can be streamed at a time")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt
        return [self.prompt]  # type: ignore[list-item]

    @property
    def opening(self) -> Any:
        return "completions"


def text_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(request: Request, body: TextBody) -> Response:
        """Replies to each prompt. Further prompts are sessions of their own, by the name of the first with a number."""
        service.check_model(body.model)
        who = resolve(request.headers, body)
        asked = [
            _request(who if i == 0 else who._replace(session=f"{who.session[:120]}.{i}"), body, prompt)
            for i, prompt in enumerate(body.prompts)
        ]
        turns = [service.begin(one) for one in asked]

        async def answer() -> Response:
            exchanges = [
                Exchange(service, turn, await first_event(turn, bool(body.stream)), Tools()) for turn in turns
            ]
            if body.stream:
                return TurnStream(turns[0], _chunks(exchanges[0], body), exchanges[0].headers)
            return await _whole(exchanges, body)

        return await answered(request, answer(), *turns)

    return router


def _request(who: Identity, body: TextBody, prompt: Prompt) -> ChatRequest:
    text = prompt if isinstance(prompt, str) else ""
    return chat_request(
        who, body, [{"role": "user", "content": text}], Tools(), prompt=prompt, stop=list(body.stop or []),
        max_tokens=DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens, n=body.n or 1,
        top_logprobs=body.logprobs,
    )  # fmt: skip


async def _whole(exchanges: list[Exchange], body: TextBody) -> Response:
    choices, usages = [], []
    for exchange in exchanges:
        replies, usage = await exchange.whole()
        prompt = exchange.turn.request.prompt if body.echo else ""
        choices += [_choice(reply, prompt) for reply in replies]
        usages.append(usage)
    total = {name: sum(usage[name] for usage in usages) for name in COUNTED}
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    usage = {**usages[0], **total, "prompt_tokens_details": {"cached_tokens": cached}}
    numbered = [{"index": index, **choice} for index, choice in enumerate(choices)]
    first = exchanges[0]
    return JSONResponse({**_head(first.service), "choices": numbered, "usage": usage}, headers=first.headers)


def _choice(reply: Reply, prompt: Any) -> dict[str, Any]:
    return {
        "text": f"{prompt}{reply.text}",
        "logprobs": _logprobs(reply.logprobs, 0),
        "finish_reason": reply.finish,
    }


async def _chunks(exchange: Exchange, body: TextBody) -> AsyncIterator[bytes]:
    head, shown = _head(exchange.service), [0] * exchange.turn.request.n

    def chunk(index: int, text: str, logprobs: Logprobs | None = None, reason: str | None = None) -> bytes:
        found = _logprobs(logprobs, shown[index])
        shown[index] += len(text)
        return event(
            {**head, "choices": [{"index": index, "text": text, "logprobs": found, "finish_reason": reason}]}
        )

    if body.echo:
        for index in range(exchange.turn.request.n):
            yield chunk(index, str(exchange.turn.request.prompt))
    async for news in exchange.shown():
        if news is None:
            yield KEEP_ALIVE
        elif isinstance(news, Shown):
            yield chunk(
                news.reply, "".join(p.text for p in news.parts if isinstance(p, TextPart)), news.logprobs
            )
        elif isinstance(news, Failed):
            yield event(envelope(news.error))
        elif isinstance(news, Finished):
            for index, choice in enumerate(news.choices):
                yield chunk(index, "", reason=finish_reason(choice))
            if body.stream_options and body.stream_options.include_usage:
                yield event({**head, "choices": [], "usage": news.usage})
            yield DONE


def _head(service: Service) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.runtime.model_name,
    }


def _logprobs(logprobs: Logprobs | None, offset: int) -> dict[str, Any] | None:
    """In the shape of this route: lists, one entry a token. `offset`: characters of the text before the first."""
    if logprobs is None:
        return None
    texts = [one.piece.decode(errors="replace") for one in logprobs]
    starts = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [
            {other.piece.decode(errors="replace"): other.logprob for other in one.top} for one in logprobs
        ],
        "text_offset": starts,
    }
