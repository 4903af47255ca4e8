"""A chat reply that arrives piece by piece, for sync and async callers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self

import httpx

from agentmem.daemon import Endpoint
from agentmem.wire import Assembly, ChatResult, transport_error


class ChatStream:
    """Iterate for pieces of text, then read `result`, the whole reply. Closing it early cancels the turn."""

    def __init__(self, response: httpx.Response, endpoint: Endpoint) -> None:
        self._response = response
        self._endpoint = endpoint
        self._assembly = Assembly()

    def __iter__(self) -> Iterator[str]:
        try:
            for line in self._response.iter_lines():
                if text := self._assembly.feed(line):
                    yield text
        except httpx.TransportError as cause:
            raise transport_error(self._endpoint, cause) from cause
        finally:
            self.close()

    @property
    def result(self) -> ChatResult:
        """Raises AgentMemError when the stream was not read to its end."""
        return self._assembly.result()

    def close(self) -> None:
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncChatStream:
    """`ChatStream` for `async for` and `async with`."""

    def __init__(self, response: httpx.Response, endpoint: Endpoint) -> None:
        self._response = response
        self._endpoint = endpoint
        self._assembly = Assembly()

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async for line in self._response.aiter_lines():
                if text := self._assembly.feed(line):
                    yield text
        except httpx.TransportError as cause:
            raise transport_error(self._endpoint, cause) from cause
        finally:
            await self.close()

    @property
    def result(self) -> ChatResult:
        """Raises AgentMemError when the stream was not read to its end."""
        return self._assembly.result()

    async def close(self) -> None:
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
