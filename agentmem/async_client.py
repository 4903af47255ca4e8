"""The daemon over HTTP for asyncio programs: `AsyncAgentMemClient`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import httpx

from agentmem.daemon import find_endpoint
from agentmem.streams import AsyncChatStream
from agentmem.tokens import TokenScope
from agentmem.transfers import Download, Progress, Upload, export_call, import_query
from agentmem.wire import (
    READ_TIMEOUT_S,
    Call,
    ChatResult,
    History,
    Message,
    agent_call,
    append_call,
    chat_call,
    create_call,
    decode,
    episodes_call,
    explain_call,
    forget_call,
    fork_call,
    http_options,
    named_call,
    policy_call,
    prune_call,
    result_of,
    rotate_call,
    text_call,
    transport_error,
)


class AsyncAgentMemClient:
    """`agentmem.client.AgentMemClient` for asyncio: the same methods, awaited."""

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
        self._http = httpx.AsyncClient(
            **http_options(self.endpoint, timeout),
            transport=httpx.AsyncHTTPTransport(uds=self.endpoint.socket, trust_env=False),
        )

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

    async def create(self, name: str, **asked: Any) -> dict[str, Any]:
        """A new agent without turns; `asked`: pinned, persist, quota_bytes, encrypt, reuse, planner, policy.

        Raises AlreadyExists.
        """
        return await self._ask(create_call(name, self.namespace, asked))

    async def set_policy(self, name: str, **changes: Any) -> dict[str, Any]:
        """See `AgentMemClient.set_policy`."""
        return await self._ask(policy_call(name, self.namespace, changes))

    async def fork(
        self, name: str, new: str, *, session: str | None = None, at: int | None = None
    ) -> dict[str, Any]:
        """A new agent that goes on from `name` as it was after turn `at`. Raises NotFound, AlreadyExists, BadRequest."""
        return await self._ask(fork_call(name, new, self.namespace, session, at))

    async def prune(
        self, older_s: float, *, dry_run: bool = False, namespace: str | None = None
    ) -> dict[str, Any]:
        """Drop from disk the state of agents not used for `older_s` seconds; their tokens stay."""
        return await self._ask(prune_call(older_s, dry_run, namespace))

    async def forget(self, name: str, *, session: str | None = None) -> dict[str, Any]:
        """See `AgentMemClient.forget`."""
        return await self._ask(forget_call(name, self.namespace, session))

    async def append(
        self,
        name: str,
        messages: str | list[Message],
        *,
        session: str | None = None,
        role: str = "user",
        background: bool = False,
    ) -> dict[str, Any]:
        """See `AgentMemClient.append`."""
        return await self._ask(append_call(name, messages, self.namespace, session, role, background))

    async def jobs(self) -> list[dict[str, Any]]:
        """See `AgentMemClient.jobs`."""
        return (await self._ask(Call("GET", "/v1/jobs", query={"namespace": self.namespace})))["data"]

    async def job(self, id: str) -> dict[str, Any]:
        """See `AgentMemClient.job`."""
        return await self._ask(named_call("GET", "jobs", id, self.namespace))

    async def cancel_job(self, id: str) -> dict[str, Any]:
        """See `AgentMemClient.cancel_job`."""
        return await self._ask(named_call("DELETE", "jobs", id, self.namespace))

    async def explain(self, name: str, session: str | None = None) -> dict[str, Any]:
        """See `AgentMemClient.explain`."""
        return await self._ask(explain_call(name, self.namespace, session))

    async def episodes(self, name: str, session: str | None = None) -> dict[str, Any]:
        """See `AgentMemClient.episodes`."""
        return await self._ask(episodes_call(name, self.namespace, session))

    async def export(
        self, name: str, path: str | Path, *, force: bool = False, progress: Progress | None = None
    ) -> dict[str, Any]:
        """See `AgentMemClient.export`."""
        call = export_call(name, self.namespace)
        with Download(path, force, progress) as file:
            try:
                async with self._http.stream(
                    call.method, call.path, json=call.body, params=call.query
                ) as response:
                    if not response.is_success:
                        await response.aread()
                        decode(response)
                    async for piece in response.aiter_bytes(1 << 20):
                        await asyncio.to_thread(file.write, piece, response)
            except httpx.TransportError as cause:
                raise transport_error(self.endpoint, cause) from cause
            return await asyncio.to_thread(file.finish)

    async def import_agent(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        trust: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """See `AgentMemClient.import_agent`."""
        upload = Upload(path, progress)
        query = import_query(self.namespace, name, trust, force)

        async def pieces() -> AsyncIterator[bytes]:
            source = upload.pieces()
            while piece := await asyncio.to_thread(next, source, b""):
                yield piece

        try:
            return decode(
                await self._http.post(
                    "/v1/agents/import", content=pieces(), headers=upload.headers, params=query
                )
            )
        except httpx.TransportError as cause:
            raise transport_error(self.endpoint, cause) from cause

    async def health(self) -> dict[str, Any]:
        return await self._ask(Call("GET", "/health"))

    async def models(self) -> list[dict[str, Any]]:
        return (await self._ask(Call("GET", "/v1/models")))["data"]

    async def store(self) -> dict[str, Any]:
        """See `AgentMemClient.store`."""
        return await self._ask(Call("GET", "/v1/store"))

    async def verify(self, *, deep: bool = False, rebuild: bool = False) -> dict[str, Any]:
        """Whether all that is kept is as it was written (`ok`), and what is not. `rebuild`: a new index at the next start."""
        return await self._ask(Call("POST", "/v1/store/verify", {"deep": deep, "rebuild": rebuild}))

    async def verify_composed(
        self, namespace: str | None = None, planner: str | None = None
    ) -> dict[str, Any]:
        """See `AgentMemClient.verify_composed`."""
        return await self._ask(
            Call("POST", "/v1/compose/verify", {"namespace": namespace, "planner": planner})
        )

    async def declare_template(self, name: str, text: str) -> dict[str, Any]:
        """Say where the slots of prompts are: `text` with {{slots}}. Raises BadRequest for one without."""
        return await self._ask(text_call("templates", name, self.namespace, text))

    async def withdraw_template(self, name: str) -> dict[str, Any]:
        """Raises NotFound."""
        return await self._ask(named_call("DELETE", "templates", name, self.namespace))

    async def register_document(self, name: str, text: str) -> dict[str, Any]:
        """Look for `text` in prompts, under a name."""
        return await self._ask(text_call("documents", name, self.namespace, text))

    async def documents(self) -> list[dict[str, Any]]:
        """Registered documents: their names and tokens."""
        return (await self._ask(Call("GET", "/v1/documents", query={"namespace": self.namespace})))["data"]

    async def document(self, name: str) -> dict[str, Any]:
        """A document's text. Raises NotFound."""
        return await self._ask(named_call("GET", "documents", name, self.namespace))

    async def unregister_document(self, name: str) -> dict[str, Any]:
        """Raises NotFound."""
        return await self._ask(named_call("DELETE", "documents", name, self.namespace))

    async def repair(self, *, purge: bool = False) -> dict[str, Any]:
        """Put damaged extents aside, so that their tokens are read anew; `purge` empties the quarantine."""
        return await self._ask(Call("POST", "/v1/store/repair", {"purge": purge}))

    async def rotate_token(self, scope: TokenScope) -> dict[str, Any]:
        """Make the token of a scope anew, in its file. A client that sent the old one is refused from here on."""
        return await self._ask(rotate_call(scope))

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
