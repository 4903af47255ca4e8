"""Who may ask what: three checks in front of every route, as plain ASGI so that nothing runs before them."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentmem.api.errors import HeadTooLarge, TooLarge, TooSlow, WrongContentType, error_response
from agentmem.errors import AgentMemError, BadRequest, Forbidden, Unauthorized
from agentmem.server.tokens import Tokens
from agentmem.settings import Settings

LOOPBACK_HOSTS = ("127.0.0.1", "[::1]", "localhost")
WILDCARD_HOSTS = ("0.0.0.0", "::", "")
UPLOAD = "/v1/agents/import"
INFERENCE = re.compile(
    r"/v1/(chat/completions|completions|messages(/count_tokens)?|embeddings|(responses|conversations|models)(/.*)?)"
)
WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
"""Methods whose bodies are read at all."""
MOST_HEADERS = 200


def is_loopback_address(address: str) -> bool:
    """Whether `address` is a numeric loopback address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def bracketed(host: str) -> str:
    """`host` as a URL spells it."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


async def refuse(error: AgentMemError, scope: Scope, receive: Receive, send: Send) -> None:
    await error_response(error, scope["path"])(scope, receive, send)


class Gate:
    """Refuses what a browser on a foreign page can send: a Host or an Origin that is not on the list.

    The Host check ends DNS rebinding. WebSockets are not served at all: browsers open them across origins.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        hosts = {*LOOPBACK_HOSTS, *settings.allowed_hosts}
        if settings.host not in WILDCARD_HOSTS:
            hosts.add(bracketed(settings.host))
        self.hosts = frozenset(host.lower() for host in hosts)
        self.origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http" and (error := self._error(Headers(scope=scope))):
            await refuse(error, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _error(self, headers: Headers) -> AgentMemError | None:
        if len(headers.raw) > MOST_HEADERS:
            return HeadTooLarge(f"a request may have {MOST_HEADERS} headers")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0].lower()):
            return Forbidden("this Host is not served; add it to allowed_hosts", code="host_not_allowed")
        if any(origin not in self.origins for origin in headers.getlist("origin")):
            return Forbidden(
                "this Origin is not served; add it to allowed_origins", code="origin_not_allowed"
            )
        return None

    def _is_ours(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        return host in self.hosts or (
            bool(colon) and port.isascii() and port.isdecimal() and name in self.hosts
        )


class Lock:
    """Asks for a token. `/health` answers without one, but says less; inference may be opened on loopback.

    Leaves `scope["state"]["trusted"]`: whether the caller showed the token that opens everything.
    """

    def __init__(self, app: ASGIApp, settings: Settings, tokens: Tokens) -> None:
        self.app = app
        self.tokens = tokens
        self.open_inference = settings.open_inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        shown = list(_tokens(Headers(scope=scope)))
        found = self.tokens.scope_of(shown)
        scope.setdefault("state", {})["trusted"] = found == "all"
        infers = INFERENCE.fullmatch(scope["path"]) is not None
        if found == "all" or (found == "inference" and infers) or self._is_open(scope):
            await self.app(scope, receive, send)
            return
        if found is not None:
            text = "this token opens inference only; this route needs the one in the home's file `token`"
            await refuse(Forbidden(text, code="insufficient_scope"), scope, receive, send)
            return
        what = "this token is not valid" if shown else "a token is needed"
        hint = "send the text of the home's file `token` as Authorization: Bearer or x-api-key"
        await refuse(Unauthorized(f"{what}; {hint}"), scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if scope["path"] == "/health":
            return True
        client = scope.get("client")
        return (
            self.open_inference
            and client is not None
            and is_loopback_address(client[0])
            and INFERENCE.fullmatch(scope["path"]) is not None
        )


def _tokens(headers: Headers) -> Iterable[bytes]:
    for value in headers.getlist("authorization"):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer":
            yield token.strip().encode("latin-1")
    for value in headers.getlist("x-api-key"):
        yield value.strip().encode("latin-1")


class Bodies:
    """Lets only JSON bodies through, up to `max_body` bytes that arrive in time; routes see them whole.

    JSON only, because the content types that a foreign page may post without asking first are not JSON. The one exception is an
    import: up to `max_import` bytes of octet-stream, which no such page may send either; its route sees them as they come.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.timeout = settings.receive_timeout_s
        self.limit = int(settings.max_body)
        self.upload_limit = int(settings.max_import)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in WITH_BODY or _is_no_route(scope):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["method"] == "POST" and scope["path"] == UPLOAD:
            await self._upload(headers, scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(headers, receive), self.timeout)
        except TimeoutError:
            await refuse(TooSlow("the body did not arrive in time"), scope, receive, send)
        except AgentMemError as error:
            await refuse(error, scope, receive, send)
        else:
            if body is not None:
                await self.app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client left before its end."""
        _check_head(headers, self.limit, "application/json")
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.limit:
                raise _too_large(self.limit)
            if not message.get("more_body", False):
                return bytes(body)

    async def _upload(self, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a body on as it comes: each part in time, and not more than fits."""
        left, over = self.upload_limit, False

        async def counted() -> Message:
            nonlocal left, over
            if over:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.timeout)
            except TimeoutError:
                raise TooSlow("the body did not arrive in time") from None
            left -= len(message.get("body", b""))
            over = not message.get("more_body", False)
            if left < 0:
                raise _too_large(self.upload_limit)
            return message

        try:
            _check_head(headers, self.upload_limit, "application/octet-stream")
        except AgentMemError as error:
            await refuse(error, scope, receive, send)
        else:
            await self.app(scope, counted, send)


def _is_no_route(scope: Scope) -> bool:
    """An import is only ever posted: what else is asked of its path is refused for its method, whatever it brings."""
    return scope["path"] == UPLOAD and scope["method"] in ("PUT", "PATCH")


def _check_head(headers: Headers, limit: int, wanted: str) -> None:
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal()):
        raise BadRequest("the Content-Length is not a number")
    if int(length) > limit:
        raise _too_large(limit)
    has_body = int(length) > 0 or "transfer-encoding" in headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if has_body and kind != wanted:
        raise WrongContentType(f"send the body as Content-Type: {wanted}")


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes")


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body once and then what the connection says (that the client left)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
