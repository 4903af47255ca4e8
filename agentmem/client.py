"""The daemon over HTTP for Python programs: `AgentMemClient`, and for asyncio `AsyncAgentMemClient`.

Both raise the types of `agentmem.errors`, and `DaemonNotRunning` when nobody answers. Neither needs MLX.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import httpx

from agentmem.async_client import AsyncAgentMemClient
from agentmem.daemon import DaemonNotRunning, DaemonRecord, find_endpoint, running_daemon
from agentmem.streams import AsyncChatStream, ChatStream
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
        self._http = httpx.Client(
            **http_options(self.endpoint, timeout),
            transport=httpx.HTTPTransport(uds=self.endpoint.socket, trust_env=False),
        )

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
        max_tokens, temperature, …; `persist=False` makes a new agent that stays off the disk; `reuse` is what of remembered
        state may be used: "exact", "composed", "auto" or "off", and `planner` how it is composed (default: what the
        agent has).
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

    def create(self, name: str, **asked: Any) -> dict[str, Any]:
        """A new agent without turns; `asked`: pinned, persist, quota_bytes, encrypt, reuse, planner, policy.

        Raises AlreadyExists.
        """
        return self._ask(create_call(name, self.namespace, asked))

    def set_policy(self, name: str, **changes: Any) -> dict[str, Any]:
        """Change `pinned`, `quota_bytes`, `reuse`, `planner` or `policy` of an agent. Raises NotFound.

        `policy` is how much of its past it keeps at hand: {"kind": "episodic", "budget_tokens": 8192},
        {"kind": "window", "recent": 4096}, or None for all of it.
        """
        return self._ask(policy_call(name, self.namespace, changes))

    def fork(
        self, name: str, new: str, *, session: str | None = None, at: int | None = None
    ) -> dict[str, Any]:
        """A new agent that goes on from `name` as it was after turn `at`. Raises NotFound, AlreadyExists, BadRequest."""
        return self._ask(fork_call(name, new, self.namespace, session, at))

    def prune(self, older_s: float, *, dry_run: bool = False, namespace: str | None = None) -> dict[str, Any]:
        """Drop from disk the state of agents not used for `older_s` seconds; their tokens stay."""
        return self._ask(prune_call(older_s, dry_run, namespace))

    def forget(self, name: str, *, session: str | None = None) -> dict[str, Any]:
        """Delete an agent, or one session of it, for good: `{"agent", "deleted", "bytes_freed"}`. Raises NotFound."""
        return self._ask(forget_call(name, self.namespace, session))

    def append(
        self,
        name: str,
        messages: str | list[Message],
        *,
        session: str | None = None,
        role: str = "user",
        background: bool = False,
    ) -> dict[str, Any]:
        """Add a text (as `role`) or messages to an agent's session without a reply; returns the usage.

        With `background` it returns a job at once, which reads while nobody else is there, and goes on after a restart. Until it
        is done, turns of the session raise ConversationBusy.
        """
        return self._ask(append_call(name, messages, self.namespace, session, role, background))

    def jobs(self) -> list[dict[str, Any]]:
        """What is read in the background, and what of that ended lately, the oldest first."""
        return self._ask(Call("GET", "/v1/jobs", query={"namespace": self.namespace}))["data"]

    def job(self, id: str) -> dict[str, Any]:
        """One job: its state, `tokens_read` of `tokens_total`, and `error`. Raises NotFound."""
        return self._ask(named_call("GET", "jobs", id, self.namespace))

    def cancel_job(self, id: str) -> dict[str, Any]:
        """End a job; what was read stays. Raises NotFound."""
        return self._ask(named_call("DELETE", "jobs", id, self.namespace))

    def explain(self, name: str, session: str | None = None) -> dict[str, Any]:
        """Why the last turn was reused as far as it was. Raises NotFound."""
        return self._ask(explain_call(name, self.namespace, session))

    def episodes(self, name: str, session: str | None = None) -> dict[str, Any]:
        """What a session's conversation is about, and what of it is at hand. Raises NotFound."""
        return self._ask(episodes_call(name, self.namespace, session))

    def export(
        self, name: str, path: str | Path, *, force: bool = False, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Write everything an agent remembers into one file: `{"path", "bytes"}`. `progress` hears (bytes, of how many).

        Raises NotFound, and AlreadyExists unless `force` may replace the file.
        """
        call = export_call(name, self.namespace)
        with Download(path, force, progress) as file:
            try:
                with self._http.stream(call.method, call.path, json=call.body, params=call.query) as response:
                    if not response.is_success:
                        response.read()
                        decode(response)
                    for piece in response.iter_bytes(1 << 20):
                        file.write(piece, response)
            except httpx.TransportError as cause:
                raise transport_error(self.endpoint, cause) from cause
            return file.finish()

    def import_agent(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        trust: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Make an agent of an exported file, under its old name or `name`: `{"agent": AgentInfo, "kept", …}`.

        `kept` is "state", "tokens" or "messages": what of it is of use to this daemon. `trust` lets other agents share its state.
        Raises BadArchive, and AlreadyExists unless `force` may replace an agent.
        """
        upload = Upload(path, progress)
        query = import_query(self.namespace, name, trust, force)
        try:
            return decode(
                self._http.post(
                    "/v1/agents/import", content=upload.pieces(), headers=upload.headers, params=query
                )
            )
        except httpx.TransportError as cause:
            raise transport_error(self.endpoint, cause) from cause

    def health(self) -> dict[str, Any]:
        return self._ask(Call("GET", "/health"))

    def models(self) -> list[dict[str, Any]]:
        return self._ask(Call("GET", "/v1/models"))["data"]

    def store(self) -> dict[str, Any]:
        """Budgets and bytes of the block store."""
        return self._ask(Call("GET", "/v1/store"))

    def verify(self, *, deep: bool = False, rebuild: bool = False) -> dict[str, Any]:
        """Whether all that is kept is as it was written (`ok`), and what is not. `rebuild`: a new index at the next start."""
        return self._ask(Call("POST", "/v1/store/verify", {"deep": deep, "rebuild": rebuild}))

    def verify_composed(self, namespace: str | None = None, planner: str | None = None) -> dict[str, Any]:
        """How well prompts are composed: the last of each template, of all namespaces by default, against dense runs.

        `planner` is how, by default as agents do that do not say. Takes long, and waits while somebody else is there. `auto` goes
        by what is found, for this planner.
        """
        return self._ask(Call("POST", "/v1/compose/verify", {"namespace": namespace, "planner": planner}))

    def declare_template(self, name: str, text: str) -> dict[str, Any]:
        """Say where the slots of prompts are: `text` with {{slots}}. Raises BadRequest for one without."""
        return self._ask(text_call("templates", name, self.namespace, text))

    def withdraw_template(self, name: str) -> dict[str, Any]:
        """Raises NotFound."""
        return self._ask(named_call("DELETE", "templates", name, self.namespace))

    def register_document(self, name: str, text: str) -> dict[str, Any]:
        """Look for `text` in prompts, under a name."""
        return self._ask(text_call("documents", name, self.namespace, text))

    def documents(self) -> list[dict[str, Any]]:
        """Registered documents: their names and tokens."""
        return self._ask(Call("GET", "/v1/documents", query={"namespace": self.namespace}))["data"]

    def document(self, name: str) -> dict[str, Any]:
        """A document's text. Raises NotFound."""
        return self._ask(named_call("GET", "documents", name, self.namespace))

    def unregister_document(self, name: str) -> dict[str, Any]:
        """Raises NotFound."""
        return self._ask(named_call("DELETE", "documents", name, self.namespace))

    def repair(self, *, purge: bool = False) -> dict[str, Any]:
        """Put damaged extents aside, so that their tokens are read anew; `purge` empties the quarantine."""
        return self._ask(Call("POST", "/v1/store/repair", {"purge": purge}))

    def rotate_token(self, scope: TokenScope) -> dict[str, Any]:
        """Make the token of a scope anew, in its file. A client that sent the old one is refused from here on."""
        return self._ask(rotate_call(scope))

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
