"""Export and import over HTTP: what passes, how it is refused, and that nothing is buffered or left behind."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.client import AgentMemClient, AsyncAgentMemClient
from agentmem.errors import AlreadyExists, BadArchive, NotFound

STORY = "The gardener writes the name of each seed on a small stone and lays it on the wall. " * 6
BINARY = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def small(start, tmp_path_factory: pytest.TempPathFactory):
    """A daemon that takes small imports only."""
    config = tmp_path_factory.mktemp("small") / "home"
    config.mkdir()
    (config / "config.toml").write_text('max_import = "64KiB"\nlog_level = "debug"\n')
    return start(config)


@pytest.fixture(scope="module")
def archive(tiny_daemon) -> bytes:
    tiny_daemon.chat("traveller", STORY)
    response = tiny_daemon.http.post("/v1/agents/traveller/export", json={})
    assert response.status_code == 200
    return response.content


def envelope(response: Any) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]


def test_export_is_a_file(daemon, archive: bytes) -> None:
    response = daemon.http.post("/v1/agents/traveller/export")
    assert response.headers["content-type"] == "application/octet-stream"
    assert int(response.headers["content-length"]) == len(response.content) == len(archive)
    assert "traveller.safetensors" in response.headers["content-disposition"]
    length = int.from_bytes(response.content[:8], "little")
    assert json.loads(response.content[8 : 8 + length])["__metadata__"]["agentmem_archive"] == "1"


def test_import_makes_an_agent(daemon, archive: bytes) -> None:
    params = {"agent": "settler", "namespace": "elsewhere"}
    response = daemon.http.post("/v1/agents/import", content=archive, headers=BINARY, params=params)
    assert response.status_code == 200, response.text
    result = response.json()
    assert (result["kept"], result["trusted"]) == ("state", False)
    assert result["agent"]["agent"] == "settler"
    assert result["agent"]["namespace"] == "elsewhere"
    assert result["agent"]["state"] == "warm"
    assert result["bytes_written"] > 0
    who = {"agent": "settler", "namespace": "elsewhere", "history": "server"}
    usage = daemon.chat("settler", "Go on.", agentmem=who)["usage"]
    assert usage["agentmem"]["restored_tokens"] > 300


def test_a_taken_name_is_a_conflict(daemon, archive: bytes) -> None:
    response = daemon.http.post("/v1/agents/import", content=archive, headers=BINARY)
    assert response.status_code == 409
    assert envelope(response)["code"] == "already_exists"
    forced = daemon.http.post(
        "/v1/agents/import", content=archive, headers=BINARY, params={"force": "true", "trust": "true"}
    )
    assert forced.status_code == 200, forced.text


@pytest.mark.parametrize(
    ("content", "headers", "params", "status", "code"),
    [
        (b"", {}, {}, 400, "archive_header"),
        (b"no archive", BINARY, {}, 400, "archive_header"),
        (b"{}", {"content-type": "application/json"}, {}, 415, "unsupported_media_type"),
        (b"{}", {"content-type": "text/plain"}, {}, 415, "unsupported_media_type"),
        (b"x", BINARY, {"agent": "../up"}, 400, "invalid_value"),
        (b"x", BINARY, {"namespace": "a b"}, 400, "invalid_value"),
        (b"x", BINARY, {"trust": "perhaps"}, 400, "invalid_value"),
    ],
)
def test_refusals(daemon, content: bytes, headers: Any, params: Any, status: int, code: str) -> None:
    response = daemon.http.post("/v1/agents/import", content=content, headers=headers, params=params)
    assert response.status_code == status, response.text
    assert envelope(response)["code"] == code


def test_both_need_the_token(daemon) -> None:
    assert daemon.bare.post("/v1/agents/traveller/export").status_code == 401
    assert daemon.bare.post("/v1/agents/import", content=b"x", headers=BINARY).status_code == 401


def test_only_the_import_takes_octets(daemon) -> None:
    for path in ("/v1/chat/completions", "/v1/agents/import/", "/v1/agents/traveller/warm"):
        assert daemon.http.post(path, content=b"x", headers=BINARY).status_code == 415, path


def test_exporting_nobody(daemon) -> None:
    response = daemon.http.post("/v1/agents/nobody/export")
    assert response.status_code == 404
    assert envelope(response)["code"] == "not_found"


@pytest.mark.slow
def test_uploads_have_a_limit(small, archive: bytes) -> None:
    assert len(archive) > 64 << 10

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield bytes(1 << 14)

    for content in (archive, endless()):
        response = small.http.post("/v1/agents/import", content=content, headers=BINARY)
        assert response.status_code == 413
        assert envelope(response)["code"] == "body_too_large"
    assert small.http.get("/health").json()["status"] == "ok"


def test_an_upload_that_breaks_off_leaves_nothing(daemon) -> None:
    before = sorted(os.listdir(daemon.home / "store"))
    host, port = daemon.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/agents/import HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {daemon.token}\r\n"
        "Content-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + bytes(100_000))
    assert daemon.http.get("/health").json()["status"] == "ok"
    assert sorted(os.listdir(daemon.home / "store")) == before


def test_clients_move_agents(daemon, tmp_path: Path) -> None:
    path = tmp_path / "client.safetensors"
    seen: list[tuple[int, int | None]] = []
    with AgentMemClient(home=daemon.home) as client:
        client.append("mover", STORY)
        result = client.export("mover", path, progress=lambda *p: seen.append(p))
        assert result == {"path": str(path), "bytes": path.stat().st_size}
        assert seen[-1] == (result["bytes"], result["bytes"])
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(AlreadyExists):
            client.export("mover", path)
        client.export("mover", path, force=True)
        with pytest.raises(AlreadyExists):
            client.import_agent(path)
        moved = client.import_agent(path, "moved", progress=lambda *p: seen.append(p))
        assert (moved["kept"], moved["agent"]["agent"]) == ("state", "moved")
        assert seen[-1] == (result["bytes"], result["bytes"])
        (tmp_path / "bad").write_bytes(path.read_bytes()[:-1])
        with pytest.raises(BadArchive) as error:
            client.import_agent(tmp_path / "bad", "worse")
        assert (error.value.code, error.value.status) == ("archive_truncated", 400)
        with pytest.raises(NotFound):
            client.import_agent(tmp_path / "absent")
        with pytest.raises(NotFound):
            client.export("nobody", tmp_path / "nobody")
    assert sorted(os.listdir(tmp_path)) == ["bad", "client.safetensors"]


def test_async_clients_move_agents(daemon, tmp_path: Path) -> None:
    path = tmp_path / "client.safetensors"

    async def move() -> None:
        async with AsyncAgentMemClient(home=daemon.home) as client:
            await client.append("async-mover", STORY)
            result = await client.export("async-mover", path)
            assert result["bytes"] == path.stat().st_size
            moved = await client.import_agent(path, "async-moved", trust=True)
            assert (moved["kept"], moved["trusted"]) == ("state", True)
            with pytest.raises(AlreadyExists):
                await client.import_agent(path, "async-moved")
            with pytest.raises(NotFound):
                await client.export("nobody", tmp_path / "nobody")

    asyncio.run(move())
    assert os.listdir(tmp_path) == ["client.safetensors"]
