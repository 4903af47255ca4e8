"""The daemon's hold on its home: one instance, one token, one record; and its socket."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from agentmem.daemon import read_record
from agentmem.errors import AgentMemError, AlreadyRunning, Forbidden
from agentmem.home import Home, private
from agentmem.server.security import WILDCARD_HOSTS, bracketed, is_loopback_address
from agentmem.settings import Settings

log = logging.getLogger(__name__)

TOKEN_BYTES = 32
SHORTEST_TOKEN = 16
BACKLOG = 128


@contextmanager
def held(home: Home) -> Iterator[None]:
    """Hold `home` for this process alone. Raises AlreadyRunning, or Forbidden for another user's folder."""
    home.prepare()
    if home.root.stat().st_uid != os.getuid():
        raise Forbidden(f"{home.root} belongs to another user")
    lock = FileLock(home.lock, mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        record = read_record(home)
        who = f"pid {record.pid} at {record.url}" if record and record.alive else "a daemon that is starting"
        raise AlreadyRunning(f"{home.root} is held by {who}") from None
    try:
        # A record that is there now was left by a daemon that was killed.
        home.daemon.unlink(missing_ok=True)
        yield
    finally:
        home.daemon.unlink(missing_ok=True)
        lock.release()


def load_token(home: Home) -> str:
    """The home's token, made at the first start. Only its owner can read the file. Precondition: the home is held."""
    if os.path.lexists(home.token):
        return _read_token(home)
    token = secrets.token_urlsafe(TOKEN_BYTES)
    # A start that dies here must not leave an empty token, which the next one would refuse.
    temporary = home.token.with_name(f".token.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "x", encoding="ascii", opener=private) as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, home.token)
    finally:
        temporary.unlink(missing_ok=True)
    return token


def _read_token(home: Home) -> str:
    try:
        descriptor = private(home.token, os.O_RDONLY)
    except OSError as error:
        raise Forbidden(f"cannot read the token file {home.token}: {error.strerror}") from error
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
        facts = os.fstat(file.fileno())
        if facts.st_uid != os.getuid() or not stat.S_ISREG(facts.st_mode):
            raise Forbidden(f"the token file {home.token} is not a file of this user")
        if facts.st_mode & 0o077:
            log.warning("the token file was readable by others; narrowed to its owner")
            os.fchmod(file.fileno(), 0o600)
        token = file.read().strip()
    if len(token) < SHORTEST_TOKEN or not (token.isascii() and token.isprintable() and " " not in token):
        raise Forbidden(f"the token file {home.token} holds no usable token; delete it to get a new one")
    return token


def bind(settings: Settings) -> socket.socket:
    """A bound socket, not yet listening. Raises Forbidden for an address that other machines can reach."""
    host = "127.0.0.1" if settings.host == "localhost" else settings.host.strip("[]")
    if not is_loopback_address(host) and not settings.allow_remote:
        raise Forbidden(
            f"{host!r} is not a loopback address; other machines could reach it (see allow_remote)"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only then; without it every answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, settings.port))
    except OSError as error:
        listener.close()
        raise AgentMemError(
            f"cannot bind {host} port {settings.port}: {error.strerror}; choose another with --port"
        ) from error
    return listener


def listen(listener: socket.socket) -> None:
    """Take connections. Raises AgentMemError when another process took the port since `bind`."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise AgentMemError(f"cannot listen on port {listener.getsockname()[1]}: {error.strerror}") from error


def url_of(listener: socket.socket) -> str:
    """The address for a client on this machine."""
    host, port = listener.getsockname()[:2]
    if host in WILDCARD_HOSTS:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://{bracketed(host)}:{port}"
