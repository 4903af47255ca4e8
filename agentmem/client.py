"""The daemon over HTTP for Python programs: `AgentMemClient`, and for asyncio `AsyncAgentMemClient`.

Both raise the types of `agentmem.errors`, and `DaemonNotRunning` when nobody answers. Neither needs MLX.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import httpx

from agentmem.daemon import DaemonNotRunning, DaemonRecord, Endpoint, find_endpoint, running_daemon
from agentmem.streams import AsyncChatStream, ChatStream
from agentmem.wire import (
    Call,
    ChatResult,
    History,
    Message,
    agent_call,
    append_call,
    chat_call,
    decode,
    explain_call,
    result_of,
    transport_error,
)

__all__ = [
    "AgentMemClient",
    "AsyncAgentMemClient",
    "AsyncChatStream",
    "ChatResult",
    "ChatStream",
    "DaemonNotRunning",
    "DaemonRecord",
    "running_daemon",
]

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0


def _http_options(endpoint: Endpoint, timeout: float) -> dict[str, Any]:
    # trust_env=False: a proxy named in the environment must never see the token.
    return {
        "base_url": endpoint.url,
        "headers": {"authorization": f"Bearer {endpoint.token}"} if endpoint.token else {},
        "timeout": httpx.Timeout(timeout, connect=CONNECT_TIMEOUT_S),
        "trust_env": False,
    }


class AgentMemClient:
    """A connection to the daemon. Without `url` it is the one that holds `home` (default: the usual home).

    Raises DaemonNotRunning when there is none. `namespace` applies to every call. `timeout` is in seconds,
    from one byte of an answer to the next.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        home: str | Path | None = None,
        *,
        namespace: str = "default",
        timeout: float = READ_TIMEOUT_S,
    ) -> None:
        self.endpoint = find_endpoint(url, token, home)
        self.namespace = namespace
        self._http = httpx.Client(**_http_options(self.endpoint, timeout))

    @overload
    def chat(
        self,
        agent: str,
        messages: str | list[Message],
        *,
        stream: Literal[False] = False,
        session: str | None = None,
        history: History | None = None,
        **options: Any,
    ) -> ChatResult: ...

    @overload
    def chat(
        self,
        agent: str,
        messages: str | list[Message],
        *,
        stream: Literal[True],
        session: str | None = None,
        history: History | None = None,
        **options: Any,
    ) -> ChatStream: ...

    def chat(
        self,
        agent: str,
        messages: str | list[Message],
        *,
        stream: bool = False,
        session: str | None = None,
        history: History | None = None,
        **options: Any,
    ) -> ChatResult | ChatStream:
        """One turn of `agent`. A text follows what its session remembers (history "server"); a list of
        messages is the whole conversation (history "client"). `options` are fields of the request:
        max_tokens, temperature, …
        """
        if stream:
            return self.stream_chat(agent, messages, session=session, history=history, **options)
        return result_of(
            self._ask(chat_call(agent, messages, self.namespace, session, history, False, options))
        )

    def stream_chat(
        self,
        agent: str,
        messages: str | list[Message],
        *,
        session: str | None = None,
        history: History | None = None,
        **options: Any,
    ) -> ChatStream:
        """Like `chat`, piece by piece: iterate the answer for text, then read its `result`."""
        call = chat_call(agent, messages, self.namespace, session, history, True, options)
        request = self._http.build_request(call.method, call.path, json=call.body)
        try:
            response = self._http.send(request, stream=True)
            if not response.is_success:
                response.read()
                decode(response)
        except httpx.TransportError as cause:
            raise transport_error(self.endpoint, cause) from cause
        return ChatStream(response, self.endpoint)

    def agents(self) -> list[dict[str, Any]]:
        """Every agent of the namespace, as AgentInfo."""
        return self._ask(Call("GET", "/v1/agents", query={"namespace": self.namespace}))["data"]

    def agent(self, name: str) -> dict[str, Any]:
        """One agent, as AgentInfo. Raises NotFound."""
        return self._ask(agent_call("GET", name, self.namespace))

    def warm(self, name: str) -> dict[str, Any]:
        """Bring an agent's state from disk into RAM. Raises NotFound."""
        return self._ask(agent_call("POST", name, self.namespace, "warm"))

    def evict(self, name: str) -> dict[str, Any]:
        """Take an agent's state out of RAM; it stays on disk. Raises NotFound."""
        return self._ask(agent_call("POST", name, self.namespace, "evict"))

    def forget(self, name: str) -> dict[str, Any]:
        """Delete an agent for good: `{"agent", "deleted", "bytes_freed"}`. Raises NotFound."""
        return self._ask(agent_call("DELETE", name, self.namespace))

    def append(
        self, name: str, messages: str | list[Message], *, session: str | None = None, role: str = "user"
    ) -> dict[str, Any]:
        """Add a text (as `role`) or messages to an agent's session without a reply; returns the usage."""
        return self._ask(append_call(name, messages, self.namespace, session, role))

    def explain(self, name: str, session: str | None = None) -> dict[str, Any]:
        """Why the last turn was reused as far as it was. Raises NotFound."""
        return self._ask(explain_call(name, self.namespace, session))

    def health(self) -> dict[str, Any]:
        return self._ask(Call("GET", "/health"))

    def models(self) -> list[dict[str, Any]]:
        return self._ask(Call("GET", "/v1/models"))["data"]

    def store(self) -> dict[str, Any]:
        """Budgets and bytes of the block store."""
        return self._ask(Call("GET", "/v1/store"))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, call: Call) -> dict[str, Any]:
        try:
            return decode(self._http.request(call.method, call.path, json=call.body, params=call.query))
        except httpx.TransportError as cause:
            raise transport_error(self.endpoint, cause) from cause


class AsyncAgentMemClient:
    """`AgentMemClient` for asyncio: the same methods, awaited."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        home: str | Path | None = None,
        *,
        namespace: str = "default",
        timeout: float = READ_TIMEOUT_S,
    ) -> None:
        self.endpoint = find_endpoint(url, token, home)
        self.namespace = namespace
        self._http = httpx.AsyncClient(**_http_options(self.endpoint, timeout))

    @overload
    async def chat(
        self,
        agent: str,
        messages: str | list[Message],
        *,
        stream: Literal[False] = False,
        session: str | None = None,
        history: History | None = None,
        **options: Any,
    ) -> ChatResult: ...

    @overload
    async def chat(
        self,
        agent: str,
        messages: str | list[Message],
        *,
        stream: Literal[True],
        session: str | None = None,
        history: History | None = None,
        **options: Any,
    ) -> AsyncChatStream: ...

    async def chat(
        self,
        agent: str,
        messages: str | list[Message],
        *,
        stream: bool = False,
        session: str | None = None,
        history: History | None = None,
        **options: Any,
    ) -> ChatResult | AsyncChatStream:
        """See `AgentMemClient.chat`."""
        if stream:
            return await self.stream_chat(agent, messages, session=session, history=history, **options)
        call = chat_call(agent, messages, self.namespace, session, history, False, options)
        return result_of(await self._ask(call))

    async def stream_chat(
        self,
        agent: str,
        messages: str | list[Message],
        *,
        session: str | None = None,
        history: History | None = None,
        **options: Any,
    ) -> AsyncChatStream:
        """See `AgentMemClient.stream_chat`."""
        call = chat_call(agent, messages, self.namespace, session, history, True, options)
        request = self._http.build_request(call.method, call.path, json=call.body)
        try:
            response = await self._http.send(request, stream=True)
            if not response.is_success:
                await response.aread()
                decode(response)
        except httpx.TransportError as cause:
            raise transport_error(self.endpoint, cause) from cause
        return AsyncChatStream(response, self.endpoint)

    async def agents(self) -> list[dict[str, Any]]:
        """See `AgentMemClient.agents`."""
        return (await self._ask(Call("GET", "/v1/agents", query={"namespace": self.namespace})))["data"]

    async def agent(self, name: str) -> dict[str, Any]:
        """See `AgentMemClient.agent`."""
        return await self._ask(agent_call("GET", name, self.namespace))

    async def warm(self, name: str) -> dict[str, Any]:
        """See `AgentMemClient.warm`."""
        return await self._ask(agent_call("POST", name, self.namespace, "warm"))

    async def evict(self, name: str) -> dict[str, Any]:
        """See `AgentMemClient.evict`."""
        return await self._ask(agent_call("POST", name, self.namespace, "evict"))

    async def forget(self, name: str) -> dict[str, Any]:
        """See `AgentMemClient.forget`."""
        return await self._ask(agent_call("DELETE", name, self.namespace))

    async def append(
        self, name: str, messages: str | list[Message], *, session: str | None = None, role: str = "user"
    ) -> dict[str, Any]:
        """See `AgentMemClient.append`."""
        return await self._ask(append_call(name, messages, self.namespace, session, role))

    async def explain(self, name: str, session: str | None = None) -> dict[str, Any]:
        """See `AgentMemClient.explain`."""
        return await self._ask(explain_call(name, self.namespace, session))

    async def health(self) -> dict[str, Any]:
        return await self._ask(Call("GET", "/health"))

    async def models(self) -> list[dict[str, Any]]:
        return (await self._ask(Call("GET", "/v1/models")))["data"]

    async def store(self) -> dict[str, Any]:
        """See `AgentMemClient.store`."""
        return await self._ask(Call("GET", "/v1/store"))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, call: Call) -> dict[str, Any]:
        try:
            return decode(await self._http.request(call.method, call.path, json=call.body, params=call.query))
        except httpx.TransportError as cause:
            raise transport_error(self.endpoint, cause) from cause
