"""The API's requests and answers as plain data: shared by the clients, sends nothing itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import httpx

from agentmem.daemon import DaemonNotRunning, Endpoint
from agentmem.errors import (
    AgentLocked,
    AgentMemError,
    AlreadyExists,
    AlreadyRunning,
    BadArchive,
    BadRequest,
    ContextOverflow,
    ConversationBusy,
    Forbidden,
    ModelUnavailable,
    NotFound,
    Overloaded,
    StoreError,
    Unauthorized,
)
from agentmem.tokens import TokenScope

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0

Message = dict[str, Any]
History = Literal["client", "server"]


@dataclass(slots=True)
class ChatChoice:
    """One of the replies to a prompt. `logprobs`: one object for each token, in OpenAI's shape, when asked for."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class ChatResult:
    """A whole reply. `usage` has OpenAI's shape plus the `agentmem` object (tokens, and milliseconds).

    `choices` holds all replies of a request with `n` above 1; the first is the one that the session keeps.
    """

    choices: list[ChatChoice]
    usage: dict[str, Any]
    id: str
    model: str

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[dict[str, Any]] | None:
        return self.choices[0].logprobs

    @property
    def memory(self) -> dict[str, Any]:
        """The `usage.agentmem` object."""
        return self.usage.get("agentmem", {})

    @property
    def composed_tokens(self) -> int:
        """Prompt tokens whose state was put together from elsewhere: approximate."""
        return self.memory.get("composed_tokens", 0)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose state was reused exactly."""
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


class Call(NamedTuple):
    """One request of the API, before anything is sent."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    query: dict[str, str] | None = None


def http_options(endpoint: Endpoint, timeout: float) -> dict[str, Any]:
    """What every HTTP client of ours is made with; `timeout` in seconds, from one byte of an answer to the next."""
    # The address stays that of TCP where a socket is used: its Host is one that the daemon knows.
    # trust_env=False: a proxy named in the environment must never see the token.
    return {
        "base_url": endpoint.url,
        "headers": {"authorization": f"Bearer {endpoint.token}"} if endpoint.token else {},
        "timeout": httpx.Timeout(timeout, connect=CONNECT_TIMEOUT_S),
        "trust_env": False,
    }


def chat_call(
    agent: str,
    messages: str | list[Message],
    namespace: str,
    session: str | None,
    history: History | None,
    stream: bool,
    options: dict[str, Any],
) -> Call:
    text_only = isinstance(messages, str)
    who: dict[str, Any] = {
        "agent": agent,
        "namespace": namespace,
        "history": history or ("server" if text_only else "client"),
    }
    if session is not None:
        who["session"] = session
    for name in ("persist", "reuse", "planner"):
        if (value := options.pop(name, None)) is not None:
            who[name] = value
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": messages}] if text_only else messages,
        "agentmem": who,
        **options,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    return Call("POST", "/v1/chat/completions", body)


def agent_call(method: str, agent: str, namespace: str, verb: str = "", **query: str) -> Call:
    path = f"/v1/agents/{quote(agent, safe='')}" + (f"/{verb}" if verb else "")
    return Call(method, path, {} if method == "POST" else None, {"namespace": namespace, **query})


def forget_call(agent: str, namespace: str, session: str | None) -> Call:
    verb = "" if session is None else f"sessions/{quote(session, safe='')}"
    return agent_call("DELETE", agent, namespace, verb)


def append_call(
    agent: str,
    messages: str | list[Message],
    namespace: str,
    session: str | None,
    role: str,
    background: bool,
) -> Call:
    body: dict[str, Any] = (
        {"text": messages, "role": role} if isinstance(messages, str) else {"messages": messages}
    )
    if session is not None:
        body["session"] = session
    if background:
        body["background"] = True
    return agent_call("POST", agent, namespace, "append")._replace(body=body)


def create_call(agent: str, namespace: str, asked: dict[str, Any]) -> Call:
    return Call("POST", "/v1/agents", {"agent": agent, **asked}, {"namespace": namespace})


def policy_call(agent: str, namespace: str, changes: dict[str, Any]) -> Call:
    return agent_call("PATCH", agent, namespace)._replace(body=changes)


def fork_call(agent: str, new: str, namespace: str, session: str | None, at: int | None) -> Call:
    body = {"agent": new, "session": session, "at": at}
    return agent_call("POST", agent, namespace, "fork")._replace(body=body)


def prune_call(older_s: float, dry_run: bool, namespace: str | None) -> Call:
    return Call("POST", "/v1/store/prune", {"older_s": older_s, "dry_run": dry_run, "namespace": namespace})


def rotate_call(scope: TokenScope) -> Call:
    return Call("POST", "/v1/token/rotate", {"scope": scope})


def named_call(method: str, kind: str, name: str, namespace: str) -> Call:
    """A template or a document."""
    return Call(method, f"/v1/{kind}/{quote(name, safe='')}", None, {"namespace": namespace})


def text_call(kind: str, name: str, namespace: str, text: str) -> Call:
    return named_call("PUT", kind, name, namespace)._replace(body={"text": text})


def explain_call(agent: str, namespace: str, session: str | None) -> Call:
    return _session_call(agent, namespace, "explain", session)


def episodes_call(agent: str, namespace: str, session: str | None) -> Call:
    return _session_call(agent, namespace, "episodes", session)


def _session_call(agent: str, namespace: str, verb: str, session: str | None) -> Call:
    named = {"session": session} if session is not None else {}
    return agent_call("GET", agent, namespace, verb, **named)


_KINDS: tuple[type[AgentMemError], ...] = (
    BadRequest,
    BadArchive,
    ContextOverflow,
    Unauthorized,
    AgentLocked,
    Forbidden,
    NotFound,
    Overloaded,
    ModelUnavailable,
    StoreError,
    ConversationBusy,
    AlreadyExists,
    AlreadyRunning,
)
_BY_CODE = {str(kind.code): kind for kind in _KINDS}
_GENERAL = [kind for kind in _KINDS if not issubclass(kind, ContextOverflow | BadArchive)]
_BY_TYPE = {kind.type: kind for kind in _GENERAL}
_BY_STATUS = {kind.status: kind for kind in _GENERAL if kind.status != 503}


def error_from(status: int | None, body: Any, retry_after_ms: str | None = None) -> AgentMemError:
    """The error that an answer of the daemon stands for; `body` is its decoded JSON, whatever that is.

    `status` is None for an error inside a stream.
    """
    envelope = body.get("error") if isinstance(body, dict) else None
    envelope = envelope if isinstance(envelope, dict) else {}
    code, type_ = str(envelope.get("code")), str(envelope.get("type"))
    kind = (
        (BadArchive if code.startswith("archive_") else None)
        or _BY_CODE.get(code)
        or _BY_STATUS.get(status or 0)
        or _BY_TYPE.get(type_)
        or AgentMemError
    )
    error = kind(str(envelope.get("message") or f"the daemon answered with status {status}"))
    error.status = status or error.status
    error.type = envelope.get("type") or error.type
    error.code = envelope.get("code") or error.code
    error.param = envelope.get("param")
    if isinstance(error, Overloaded) and retry_after_ms and retry_after_ms.isdecimal():
        error.retry_after_ms = int(retry_after_ms)
    return error


def transport_error(endpoint: Endpoint, cause: httpx.TransportError) -> AgentMemError:
    """What a broken connection means to the caller."""
    if isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout):
        return DaemonNotRunning(
            f"nobody answers at {endpoint.socket or endpoint.url}; start the daemon with: agentmem up"
        )
    if isinstance(cause, httpx.TimeoutException):
        return AgentMemError(f"the daemon at {endpoint.url} did not answer in time", code="timeout")
    return AgentMemError(
        f"the daemon at {endpoint.url} broke off the connection ({cause})", code="connection_lost"
    )


def decode(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a finished answer; raises what an error answer stands for."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    raise error_from(response.status_code, body, response.headers.get("retry-after-ms"))


def result_of(body: dict[str, Any]) -> ChatResult:
    choices = [
        ChatChoice(
            choice["message"].get("content") or "",
            choice.get("finish_reason"),
            (choice.get("logprobs") or {}).get("content"),
        )
        for choice in sorted(body["choices"], key=lambda choice: choice.get("index", 0))
    ]
    return ChatResult(choices, body.get("usage") or {}, body.get("id", ""), body.get("model", ""))


@dataclass(slots=True)
class Assembly:
    """A reply as its stream events arrive."""

    choices: dict[int, ChatChoice] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    model: str = ""
    done: bool = False

    def feed(self, line: str) -> str:
        """Take one line of the event stream; returns the new text of the first reply, often empty."""
        if not line.startswith("data:"):
            return ""
        data = line[5:].strip()
        if data == "[DONE]":
            self.done = True
            return ""
        event = json.loads(data)
        if "error" in event:
            raise error_from(None, event)
        self.id, self.model = event.get("id", self.id), event.get("model", self.model)
        self.usage = event.get("usage") or self.usage
        return "".join(self._add(choice) for choice in event.get("choices", []))

    def _add(self, chunk: dict[str, Any]) -> str:
        index = chunk.get("index", 0)
        choice = self.choices.setdefault(index, ChatChoice())
        text = (chunk.get("delta") or {}).get("content") or ""
        choice.text += text
        choice.finish_reason = chunk.get("finish_reason") or choice.finish_reason
        if (logprobs := (chunk.get("logprobs") or {}).get("content")) is not None:
            choice.logprobs = choice.logprobs if choice.logprobs is not None else []
            choice.logprobs += logprobs
        return "" if index else text

    def result(self) -> ChatResult:
        if not self.done or 0 not in self.choices:
            raise AgentMemError("the reply broke off before its end", code="connection_lost")
        return ChatResult([self.choices[i] for i in sorted(self.choices)], self.usage, self.id, self.model)
