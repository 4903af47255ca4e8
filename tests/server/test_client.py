"""The Python clients: the same calls, the same results, the same errors; and where the token may go."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem.client import AgentMemClient, AsyncAgentMemClient, ChatResult, DaemonNotRunning
from agentmem.daemon import DaemonRecord, find_endpoint
from agentmem.errors import AgentMemError, BadRequest, ContextOverflow, NotFound, Unauthorized
from agentmem.home import Home


@pytest.fixture
def client(daemon):
    with AgentMemClient(home=daemon.home) as client:
        yield client


def test_client_needs_no_mlx() -> None:
    code = "import sys, agentmem.client; sys.exit(any(m.split('.')[0] == 'mlx' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_text_continues_and_messages_are_the_whole(client: AgentMemClient) -> None:
    first = client.chat("talker", "My cat is called Turing.", max_tokens=8)
    second = client.chat("talker", "What is my cat called?", max_tokens=8)
    assert isinstance(second, ChatResult)
    assert second.cached_tokens >= first.usage["prompt_tokens"]
    whole = client.chat("talker", [{"role": "user", "content": "What is my cat called?"}], max_tokens=8)
    assert whole.usage["prompt_tokens"] < second.usage["prompt_tokens"]
    assert whole.memory["agent"] == "talker"


def test_stream_gives_pieces_and_then_the_result(daemon) -> None:
    # Rooms of their own: both turns are cold ones.
    with AgentMemClient(home=daemon.home, namespace="whole") as other:
        whole = other.chat("piece", "Name a river.", max_tokens=12, temperature=0)
    with AgentMemClient(home=daemon.home, namespace="pieces") as other:
        stream = other.stream_chat("piece", "Name a river.", max_tokens=12, temperature=0)
        pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.result.text == whole.text
    assert stream.result.finish_reason == whole.finish_reason
    assert stream.result.usage["completion_tokens"] == whole.usage["completion_tokens"]
    assert stream.result.memory["agent"] == "piece"


def test_stream_left_early_has_no_result(client: AgentMemClient) -> None:
    with client.chat("early", "Name ten rivers.", max_tokens=64, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(AgentMemError):
        _ = stream.result


def test_agents_of_a_client(client: AgentMemClient) -> None:
    client.append("owned", "The password is swordfish.", role="system")
    assert "owned" in [agent["agent"] for agent in client.agents()]
    assert client.evict("owned")["state"] == "warm"
    assert client.warm("owned")["state"] == "hot"
    assert client.agent("owned")["sessions"] == ["default"]
    assert client.explain("owned")["agent"] == "owned"
    client.chat("owned", "Hello", session="other", max_tokens=2)
    assert client.forget("owned", session="other")["session"] == "other"
    assert client.agent("owned")["sessions"] == ["default"]
    assert client.forget("owned")["deleted"] is True
    with pytest.raises(NotFound):
        client.agent("owned")


def test_daemon_of_a_client(client: AgentMemClient, daemon) -> None:
    assert client.health()["pid"] == daemon.process.pid
    assert len(client.models()) == 1
    assert client.store()


def test_errors_come_back_as_they_were_raised(client: AgentMemClient, daemon) -> None:
    with pytest.raises(BadRequest) as bad:
        client.chat("a/b", "x")
    assert (bad.value.status, bad.value.param) == (400, "agent")
    with pytest.raises(ContextOverflow):
        client.chat("over", "x", max_tokens=10**6)
    with pytest.raises(ContextOverflow):
        client.stream_chat("over", "x", max_tokens=10**6)
    with pytest.raises(NotFound) as unknown:
        client.chat("over", "x", model="gpt-9")
    assert unknown.value.code == "model_not_found"
    with AgentMemClient(daemon.url, token="wrong") as stranger, pytest.raises(Unauthorized):
        stranger.agents()


def test_async_client_does_the_same(daemon) -> None:
    async def talk() -> None:
        async with AsyncAgentMemClient(home=daemon.home) as client:
            whole = await client.chat("async-a", "Name a lake.", max_tokens=8)
            assert whole.text
            stream = await client.stream_chat("async-b", "Name a lake.", max_tokens=8)
            assert "".join([piece async for piece in stream]) == stream.result.text != ""
            await client.append("async-a", "More.")
            assert (await client.evict("async-a"))["state"] == "warm"
            assert (await client.warm("async-a"))["state"] == "hot"
            assert (await client.explain("async-a"))["agent"] == "async-a"
            assert {"async-a", "async-b"} <= {agent["agent"] for agent in await client.agents()}
            assert (await client.health())["status"] == "ok"
            assert await client.models()
            assert await client.store()
            assert (await client.forget("async-a"))["deleted"] is True
            with pytest.raises(NotFound):
                await client.agent("async-a")
            with pytest.raises(BadRequest):
                await client.stream_chat("async-b", [], max_tokens=1)

    asyncio.run(talk())


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(DaemonNotRunning, match="agentmem up"):
        AgentMemClient(home=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with AgentMemClient(f"http://127.0.0.1:{port}", home=tmp_path) as client, pytest.raises(DaemonNotRunning):
        client.health()


def a_record(pid: int, url: str, started: float) -> DaemonRecord:
    return DaemonRecord(pid=pid, url=url, port=1, model="m", version="0", home="h", started=started)


@pytest.fixture
def secret_home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.token.write_text("secret-of-this-home\n")
    return home


def test_token_does_not_go_to_whoever_took_a_dead_daemons_port(secret_home: Home) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        url = f"http://127.0.0.1:{stranger.getsockname()[1]}"
        a_record(dead.pid, url, started=2e9).write(secret_home)
        with pytest.raises(DaemonNotRunning):
            AgentMemClient(home=secret_home.root)
        stranger.settimeout(0)
        with pytest.raises(BlockingIOError):
            stranger.accept()


def test_later_process_with_a_dead_daemons_pid_is_not_trusted(secret_home: Home) -> None:
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        a_record(alive.pid, "http://127.0.0.1:1", started=1e9).write(secret_home)
        with pytest.raises(DaemonNotRunning):
            find_endpoint(home=secret_home.root)
        a_record(alive.pid, "http://127.0.0.1:1", started=4e9).write(secret_home)
        assert find_endpoint(home=secret_home.root).token == "secret-of-this-home"
        a_record(alive.pid, "http://192.0.2.1:1", started=4e9).write(secret_home)
        with pytest.raises(DaemonNotRunning):
            find_endpoint(home=secret_home.root)
    finally:
        alive.communicate(b"\n")


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://127.0.0.1:9/v1", True),
        ("http://localhost:9", True),
        ("http://[::1]:9", True),
        ("http://192.0.2.1:9", False),
        ("http://localhost.evil.example", False),
        ("http://127.0.0.1@evil.example", False),
    ],
)
def test_homes_token_goes_to_loopback_only(secret_home: Home, url: str, sent: bool) -> None:
    assert (find_endpoint(url, home=secret_home.root).token is not None) is sent
    assert find_endpoint(url, "named", secret_home.root).token == "named"
