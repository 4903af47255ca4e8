"""A request for replies, from the body to the events that every API writes down in its own words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from agentmem.api.fields import SampledBody
from agentmem.api.identity import Identity
from agentmem.api.service import Service
from agentmem.api.sse import KEEP_ALIVE_S
from agentmem.api.tools import Tools
from agentmem.api.turn import Turn
from agentmem.engine.request import ChatRequest, Choice, Delta, Event, Failed, Finished, Logprobs, Started
from agentmem.model.calls import Call, CallReader, Part, TextPart

FIRST_EVENT_S = 2.0
CLIENT_CLOSED_REQUEST = 499

Result = TypeVar("Result")


class Shown(NamedTuple):
    """What is new of one of the replies, counted from 0."""

    reply: int
    parts: list[Part]
    logprobs: Logprobs | None = None


class Reply(NamedTuple):
    """A whole reply. `finish`: stop, length or tool_calls; `stop` is the stop string that ended it."""

    text: str
    calls: list[Call]
    finish: str
    logprobs: Logprobs | None = None
    stop: str | None = None


def chat_request(
    who: Identity, body: SampledBody, messages: list[dict[str, Any]], tools: Tools, **fields: Any
) -> ChatRequest:
    """The engine's form of a request. `max_tokens` of 0 and a request that prewarms only read the prompt. Raises BadRequest."""
    limit = fields.pop("max_tokens", None)
    return ChatRequest(
        agent=who.agent,
        session=who.session,
        namespace=who.namespace,
        identity_source=who.source,
        parents=who.parents,
        messages=messages,
        sampling=body.sampling(),
        tools=tools.tools or None,
        max_tokens=limit or None,
        generate=limit != 0 and not body.prewarms,
        **{**body.engine_fields(), **fields},
    )


class Exchange:
    """One turn, its tools, and what was said of it so far."""

    def __init__(self, service: Service, turn: Turn, first: Event | None, tools: Tools) -> None:
        self.service, self.turn, self.first, self.tools = service, turn, first, tools

    @classmethod
    async def begin(
        cls, service: Service, request: ChatRequest, tools: Tools, schema: dict[str, Any] | None = None
    ) -> Turn:
        """Submit a turn whose replies are values of `schema`, or calls of tools where they must be. Raises AgentMemError."""
        if (tools.must or schema is not None) and request.generate:
            request.constraint = await run_in_threadpool(
                service.runtime.constraint,
                schema if not tools.must else None,
                tools.tools if tools.must or tools.readable else [],
                tools.name,
                parallel=tools.parallel,
            )
        return service.begin(request)

    @property
    def headers(self) -> dict[str, str]:
        """What was remembered, for clients that never ask for usage. Says less while the plan is not made.

        `x-agentmem-store` is there while turns are not kept, and says why.
        """
        request, first = self.turn.request, self.first
        headers = {"x-agentmem-agent": request.agent, "x-agentmem-session": request.session}
        if isinstance(first, Started):
            headers["x-agentmem-cache"] = reuse_word(first)
            headers["x-agentmem-cached-tokens"] = str(first.cached_tokens)
            headers["x-agentmem-composed"] = str(first.composed_tokens)
        if self.service.runtime.degraded:
            headers["x-agentmem-store"] = self.service.runtime.degraded
        return headers

    async def whole(self) -> tuple[list[Reply], dict[str, Any]]:
        """All replies, and the usage. Raises the error that the turn failed with."""
        end = self.first if isinstance(self.first, Finished) else await self.turn.finish()
        return [self.reply(choice) for choice in end.choices], end.usage

    def reply(self, choice: Choice) -> Reply:
        """A whole reply, its calls apart from its text."""
        finish = finish_reason(choice)
        if not self.tools.readable:
            return Reply(choice.text, [], finish, choice.logprobs, choice.stop)
        text, calls = self.service.runtime.tools.apart(choice.text, self.tools.tools)
        finish = "tool_calls" if calls and finish == "stop" else finish
        return Reply(text, calls, finish, choice.logprobs, choice.stop)

    async def shown(self) -> AsyncIterator[Shown | Finished | Failed | None]:
        """What comes of the turn, None for every while in which nothing came. A reply's last parts come before `Finished`."""
        readers: dict[int, CallReader] = {}
        event = self.first
        while True:
            if isinstance(event, Delta):
                yield Shown(event.index, self._parts(readers, event), event.logprobs)
            elif isinstance(event, Finished):
                for index, reader in readers.items():
                    if rest := reader.finish():
                        yield Shown(index, rest)
            if event is None or isinstance(event, Finished | Failed):
                yield event
            if isinstance(event, Finished | Failed):
                return
            event = await self.turn.next(KEEP_ALIVE_S)

    def _parts(self, readers: dict[int, CallReader], delta: Delta) -> list[Part]:
        if not self.tools.readable:
            return [TextPart(delta.text)] if delta.text else []
        if delta.index not in readers:
            readers[delta.index] = self.service.runtime.tools.reader(self.tools.tools)
        return readers[delta.index].add(delta.text)


def finish_reason(choice: Choice) -> str:
    """In OpenAI's words: a cancelled reply is one that was cut short."""
    return "length" if choice.finish_reason == "cancelled" else choice.finish_reason


def reuse_word(started: Started) -> str:
    """`hit` when at least half of the prompt was remembered."""
    if started.cached_tokens == 0:
        return "miss"
    return "hit" if started.cached_tokens * 2 >= started.prompt_tokens else "partial"


async def first_event(turn: Turn, streaming: bool) -> Event | None:
    """The first event of a turn. Raises the error that it failed with.

    Headers wait for it, so that an error has a status of its own; those of a stream not for ever, because clients give up on a
    connection that says nothing.
    """
    first = await turn.next(FIRST_EVENT_S if streaming else None)
    if isinstance(first, Failed):
        raise first.error
    return first


async def answered(request: Request, answer: Coroutine[Any, Any, Response], *turns: Turn) -> Response:
    """The answer; the turns are cancelled where it fails, or the client leaves before it is there."""
    try:
        response = await while_connected(request, answer)
    except BaseException:
        for turn in turns:
            turn.cancel()
        raise
    if response is None:
        for turn in turns:
            turn.cancel()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return response


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
