"""One response as a stream of events, each with its number."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from agentmem.api.exchange import Exchange, Shown
from agentmem.api.items import call_item, logprobs_field, new_id, text_item, text_part
from agentmem.api.sse import KEEP_ALIVE, event
from agentmem.engine.request import Failed, Finished, Logprobs
from agentmem.errors import AgentMemError
from agentmem.model.calls import ArgumentsPart, Call, CallPart, Part

if TYPE_CHECKING:
    from agentmem.api.responses import Draft


def usage_fields(usage: dict[str, Any]) -> dict[str, Any]:
    """The usage in this API's words."""
    memory = usage["agentmem"]
    written = memory["prefilled_tokens"] if memory["committed"] else 0
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "agentmem": memory,
    }


class Writer:
    """Writes one turn. Items come one after the other: the one that is open is the last of `output`."""

    def __init__(self, exchange: Exchange, draft: Draft) -> None:
        self._exchange, self._draft = exchange, draft
        self._number = -1
        self._output: list[dict[str, Any]] = []
        self._id = ""
        self._text: str | None = None
        self._logprobs: Logprobs = ()
        self._call: Call | None = None

    async def events(self) -> AsyncIterator[bytes]:
        """The stream. An error after its first event travels inside of it."""
        started = self._draft.object("in_progress", [])
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        async for news in self._exchange.shown():
            if news is None:
                yield KEEP_ALIVE
            elif isinstance(news, Shown):
                for one in self._shown(news):
                    yield one
            elif isinstance(news, Failed):
                yield self._failed(news.error)
            elif isinstance(news, Finished):
                for one in self._last_item(news):
                    yield one
                yield await self._end(news)

    async def _end(self, news: Finished) -> bytes:
        """A response that cannot be kept has failed: nobody could go on from it."""
        response = self._draft.ended(self._output, self._cut(news), news.usage)
        try:
            await self._draft.keep(response)
        except AgentMemError as error:
            return self._failed(error)
        return self._event(f"response.{response['status']}", response=response)

    def _cut(self, news: Finished) -> bool:
        return self._exchange.reply(news.choices[0]).finish == "length"

    def _failed(self, error: AgentMemError) -> bytes:
        told = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=self._draft.object("failed", self._output, error=told))

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._id, output_index=len(self._output), **fields)

    def _shown(self, news: Shown) -> list[bytes]:
        found = [one for part in news.parts for one in self._part(part, news.logprobs or ())]
        if not news.parts and news.logprobs:
            self._logprobs += news.logprobs
        return found

    def _part(self, part: Part, logprobs: Logprobs) -> list[bytes]:
        if isinstance(part, CallPart):
            return [*self._close("completed"), self._begin_call(Call(part.id, part.name, ""))]
        if isinstance(part, ArgumentsPart):
            assert self._call is not None
            self._call.arguments += part.text
            return [self._of_item("response.function_call_arguments.delta", delta=part.text)]
        opening = self._begin_text() if self._text is None else []
        self._text = (self._text or "") + part.text
        self._logprobs += logprobs
        delta = self._of_item(
            "response.output_text.delta", content_index=0, delta=part.text, logprobs=logprobs_field(logprobs)
        )
        return [*opening, delta]

    def _begin_text(self) -> list[bytes]:
        closed = self._close("completed")
        self._id, self._text, self._logprobs = new_id("msg"), "", ()
        item = {**text_item(self._id, "", "in_progress"), "content": []}
        return [
            *closed,
            self._event("response.output_item.added", output_index=len(self._output), item=item),
            self._of_item("response.content_part.added", content_index=0, part=text_part("")),
        ]

    def _begin_call(self, call: Call) -> bytes:
        self._id, self._call = new_id("fc"), call
        item = call_item(self._id, call, "in_progress")
        return self._event("response.output_item.added", output_index=len(self._output), item=item)

    def _last_item(self, news: Finished) -> list[bytes]:
        """The end of the last item; a reply of nothing is a text of nothing."""
        opened = self._begin_text() if not self._output and self._text is None and self._call is None else []
        return [*opened, *self._close("incomplete" if self._cut(news) else "completed")]

    def _close(self, status: str) -> list[bytes]:
        """End the item that is open, if one is."""
        if self._call is not None:
            done = [self._of_item("response.function_call_arguments.done", arguments=self._call.arguments)]
            item = call_item(self._id, self._call, status)
        elif self._text is not None:
            part = text_part(self._text, self._logprobs)
            done = [
                self._of_item(
                    "response.output_text.done", content_index=0, text=self._text, logprobs=part["logprobs"]
                ),
                self._of_item("response.content_part.done", content_index=0, part=part),
            ]
            item = text_item(self._id, self._text, status, self._logprobs)
        else:
            return []
        ended = self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._text = self._call = None
        return [*done, ended]
