"""The unix socket: the way of a client on this machine, for the home's owner alone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentmem.client import AgentMemClient, AsyncAgentMemClient
from agentmem.daemon import find_endpoint, read_record
from agentmem.home import Home
from agentmem.local_socket import bind_socket, is_own_socket, socket_path


def through(path: Path | str, **options: Any) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(path))
    return httpx.Client(transport=transport, base_url="http://localhost", timeout=60, **options)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name, wherever the tests have theirs."""
    with tempfile.TemporaryDirectory(prefix="am-", dir="/tmp") as folder:
        yield Path(folder)


def test_record_names_a_socket_of_the_owner_alone(daemon, record) -> None:
    path = Path(record["socket"])
    assert path == daemon.home / "agentmem.sock"
    assert stat.S_ISSOCK(path.lstat().st_mode)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600


def test_the_socket_asks_for_the_token_too(daemon, record) -> None:
    with through(record["socket"]) as bare:
        assert bare.get("/health").json() == {"status": "ok"}
        assert bare.get("/v1/agents").status_code == 401
        shown = {"authorization": f"Bearer {daemon.token}"}
        assert bare.get("/v1/agents", headers=shown).status_code == 200
        assert bare.get("/v1/agents", headers={**shown, "host": "evil.example"}).status_code == 403


def test_clients_take_the_socket_of_their_home(daemon, record) -> None:
    assert find_endpoint(home=daemon.home).socket == record["socket"]
    # With the port of somebody else in the record, only the socket leads to the daemon.
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.settimeout(0)
        home = Home(daemon.home)
        kept = home.daemon.read_bytes()
        taken = read_record(home)
        assert taken is not None
        try:
            home.daemon.write_bytes(kept.replace(str(taken.port).encode(), b"%d" % stranger.getsockname()[1]))
            with AgentMemClient(home=daemon.home) as client:
                assert client.health()["pid"] == daemon.process.pid
                assert client.chat("neighbour", "hello", max_tokens=2).usage["completion_tokens"] == 2
                stream = client.chat("neighbour", "more", max_tokens=2, stream=True)
                assert "".join(stream) == stream.result.text

            async def ask() -> dict[str, Any]:
                async with AsyncAgentMemClient(home=daemon.home) as client:
                    return await client.health()

            assert asyncio.run(ask())["pid"] == daemon.process.pid
        finally:
            home.daemon.write_bytes(kept)
        with pytest.raises(BlockingIOError):
            stranger.accept()


def test_an_address_that_is_named_is_taken(daemon) -> None:
    assert find_endpoint(daemon.url, home=daemon.home).socket is None
    with AgentMemClient(daemon.url, home=daemon.home) as client:
        assert client.health()["pid"] == daemon.process.pid


@pytest.mark.slow
def test_a_socket_that_a_killed_daemon_left_is_replaced(start, short: Path) -> None:
    home = short / "home"
    path = home / "agentmem.sock"
    start(home).stop(signal.SIGKILL)
    left = path.lstat().st_ino, path.lstat().st_mtime_ns
    second = start(home)
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) != left
    with AgentMemClient(home=home) as client:
        assert client.health()["pid"] == second.process.pid
    second.stop()
    assert not path.exists()


@pytest.fixture
def deep(tmp_path: Path) -> Home:
    """A home whose path is too long for a socket."""
    return Home(tmp_path / ("a" * 60) / ("b" * 60))


@pytest.fixture
def runtime_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("run")
    folder.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def test_a_long_path_gets_a_short_private_one(deep: Home, runtime_folder: Path) -> None:
    deep.prepare()
    listener = bind_socket(deep)
    assert listener is not None
    with listener:
        path = Path(listener.getsockname())
        assert path.parent == runtime_folder
        assert is_own_socket(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert socket_path(Home(deep.root / "other")) not in (path, None)


def test_a_folder_that_others_enter_gets_no_socket(
    deep: Home,
    runtime_folder: Path,
    short: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime_folder.chmod(0o755)
    temporary = short
    (temporary / f"agentmem-{os.getuid()}").mkdir(mode=0o700)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert (found := socket_path(deep)) is not None
    assert found.parent.parent == temporary
    (temporary / f"agentmem-{os.getuid()}").chmod(0o777)
    assert socket_path(deep) is None
    assert bind_socket(deep.prepare()) is None


def test_a_file_in_the_place_of_the_socket_stays(short: Path) -> None:
    home = Home(short / "home").prepare()
    home.socket.write_text("mine")
    assert bind_socket(home) is None
    assert home.socket.read_text() == "mine"
    home.socket.unlink()
    home.socket.symlink_to(short / "elsewhere")
    assert bind_socket(home) is None
    assert not (short / "elsewhere").exists()
