"""Who holds a home: the record a daemon leaves in `daemon.json`, and where a client may send the token."""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from agentmem.errors import AgentMemError
from agentmem.home import Home, default_home, private
from agentmem.local_socket import is_own_socket

CLOCK_SLACK_S = 5.0


@dataclass(frozen=True, slots=True)
class DaemonRecord:
    """One running daemon. `socket` is its unix socket, if it has one.

    `started` is in epoch seconds, taken when it was ready to serve.
    """

    pid: int
    url: str
    port: int
    model: str
    version: str
    home: str
    started: float
    socket: str | None = None

    def write(self, home: Home) -> None:
        """Put the record into `home` in one step, readable by the owner only."""
        temporary = home.daemon.with_name(f".daemon.{self.pid}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "x", encoding="utf-8", opener=private) as file:
                json.dump(asdict(self), file)
            os.replace(temporary, home.daemon)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def alive(self) -> bool:
        """Whether the process that wrote this still runs. A later process of the same pid does not count."""
        try:
            process = psutil.Process(self.pid)
            return (
                process.status() != psutil.STATUS_ZOMBIE
                and process.create_time() <= self.started + CLOCK_SLACK_S
            )
        except psutil.Error:
            return False


def read_record(home: Home) -> DaemonRecord | None:
    """The record in `home`, alive or not; None when there is none or it cannot be read."""
    try:
        with open(home.daemon, encoding="utf-8", opener=private) as file:
            fields = json.load(file)
        return DaemonRecord(
            pid=int(fields["pid"]),
            url=str(fields["url"]),
            port=int(fields["port"]),
            model=str(fields["model"]),
            version=str(fields["version"]),
            home=str(fields["home"]),
            started=float(fields["started"]),
            socket=str(fields["socket"]) if fields.get("socket") else None,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def running_daemon(home: Home) -> DaemonRecord | None:
    """The record in `home` when its process is alive, else None."""
    record = read_record(home)
    return record if record is not None and record.alive else None


def is_loopback(url: str) -> bool:
    """Whether `url` names this machine by a loopback address or as `localhost`."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class DaemonNotRunning(AgentMemError):
    """No daemon serves this home or this address."""

    status = 503
    type = "connection_error"
    code = "daemon_not_running"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the daemon listens, and the token for it. Requests go through `socket` when there is one."""

    url: str
    token: str | None
    socket: str | None = None


def find_endpoint(
    url: str | None = None, token: str | None = None, home: str | Path | None = None
) -> Endpoint:
    """Where to send requests. Raises DaemonNotRunning when no `url` is given and no daemon holds the home.

    The home's token goes only to the daemon that holds the home (its process is alive, its address is
    loopback), or to a loopback address that the caller named. Any other address needs a `token`.
    Without a `url` it is the daemon's unix socket, which nobody else can listen at, when it has one.
    """
    socket = None
    paths = Home(Path(home).expanduser() if home is not None else default_home())
    if url is None:
        record = running_daemon(paths)
        if record is None:
            raise DaemonNotRunning(f"no daemon is running for {paths.root}; start it with: agentmem up")
        socket = record.socket if record.socket and is_own_socket(Path(record.socket)) else None
        if socket is None and not is_loopback(record.url):
            raise DaemonNotRunning(
                f"the daemon listens at {record.url}, which is not loopback; name it with url="
            )
        url = record.url
    url = url.rstrip("/").removesuffix("/v1")
    if token is None and (socket is not None or is_loopback(url)):
        token = _read_token(paths)
    return Endpoint(url, token, socket)


def _read_token(home: Home) -> str | None:
    try:
        with open(home.token, encoding="ascii", opener=private) as file:
            return file.read().strip() or None
    except (OSError, UnicodeDecodeError):
        return None
