"""The daemon's hold on its home: one instance, one record; and its port."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from agentmem.daemon import read_record
from agentmem.errors import AgentMemError, AlreadyRunning, Forbidden
from agentmem.home import Home
from agentmem.local_socket import bind_socket
from agentmem.server.security import WILDCARD_HOSTS, bracketed, is_loopback_address
from agentmem.settings import Settings

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


@contextmanager
def local(home: Home) -> Iterator[socket.socket | None]:
    """The bound unix socket, if there can be one; it is taken away in the end. Precondition: the home is held."""
    listener = bind_socket(home)
    path = None if listener is None else Path(listener.getsockname())
    try:
        yield listener
    finally:
        if listener is not None and path is not None:
            path.unlink(missing_ok=True)
            listener.close()


def listen(listener: socket.socket) -> None:
    """Take connections. Raises AgentMemError when another process took the port since `bind`."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise AgentMemError(f"cannot listen at {listener.getsockname()}: {error.strerror}") from error


def url_of(listener: socket.socket) -> str:
    """The address for a client on this machine."""
    host, port = listener.getsockname()[:2]
    if host in WILDCARD_HOSTS:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://{bracketed(host)}:{port}"
