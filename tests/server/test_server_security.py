"""Who is let in: token, Host, Origin, content type, size."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import httpx
import pytest

from tests.tiny_model import END_TOKEN

HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "user": "security"}
CHAT = "/v1/chat/completions"


def routes(daemon) -> list[tuple[str, str]]:
    paths = daemon.http.get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


@pytest.fixture(scope="module")
def relaxed(start, tmp_path_factory: pytest.TempPathFactory):
    """A daemon with open inference, one allowed origin, a small body limit and hardly any queue."""
    flags = ("--open-inference", "--allowed-origins", "https://app.example", "--allowed-hosts", "box.local")
    home = tmp_path_factory.mktemp("relaxed") / "home"
    daemon = start(home, *flags, "--max-body", "100000", "--queue-limit", "1")
    yield daemon
    daemon.stop()


def test_every_route_but_health_needs_the_token(daemon) -> None:
    found = routes(daemon)
    assert ("DELETE", "/v1/agents/{agent}") in found
    for method, path in found:
        response = daemon.bare.request(
            method, path.format(agent="a", session="s", name="m", id="i", item="i")
        )
        expected = 200 if path == "/health" else 401
        assert response.status_code == expected, (method, path)
        if expected == 401:
            error = response.json()["error"]
            assert error.get("code", error["type"]) in ("invalid_api_key", "authentication_error")
            assert response.headers["www-authenticate"] == "Bearer"
    assert daemon.bare.get("/no/such/route").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "Basic {token}"},
        {"authorization": "{token}"},
        {"x-api-key": "{token}x"},
        {"x-api-key": ""},
        {"cookie": "token={token}"},
    ],
)
def test_wrong_token(daemon, headers: dict[str, str]) -> None:
    filled = {name: value.format(token=daemon.token) for name, value in headers.items()}
    assert daemon.bare.get("/v1/agents", headers=filled).status_code == 401


@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
def test_right_token(daemon, name: str) -> None:
    value = daemon.token if name == "x-api-key" else f"bearer {daemon.token}"
    assert daemon.bare.get("/v1/agents", headers={name: value}).status_code == 200


def test_health_says_little_to_strangers(daemon) -> None:
    assert daemon.bare.get("/health").json() == {"status": "ok"}
    known = daemon.http.get("/health").json()
    assert known["status"] == "ok"
    assert known["pid"] == daemon.process.pid


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:8377", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:80:80", 403),
        ("localhost:x", 403),
        ("127.0.0.2", 403),
        ("0.0.0.0", 403),
        ("", 403),
    ],
)
def test_host(daemon, host: str, status: int) -> None:
    response = daemon.http.get("/v1/models", headers={"host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", ""])
def test_origin_is_refused_even_with_the_token(daemon, origin: str) -> None:
    response = daemon.http.post(CHAT, json=HELLO, headers={"origin": origin})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in response.headers


def test_websockets_are_refused(daemon) -> None:
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert daemon.bare.get("/v1/agents", headers=upgrade).status_code in (400, 401, 403)


def test_files_are_for_the_owner_only(daemon) -> None:
    for name in ("token", "daemon.json"):
        assert stat.S_IMODE((daemon.home / name).stat().st_mode) == 0o600
    readable = [path for path in daemon.home.rglob("*") if path.stat().st_mode & 0o077]
    assert readable == []


def test_no_documentation_page_loads_foreign_scripts(daemon) -> None:
    assert daemon.http.get("/docs").status_code == 404
    assert daemon.http.get("/redoc").status_code == 404


def test_log_holds_no_prompt_and_no_token(daemon) -> None:
    daemon.chat("logged", "xylophone marmalade quarterdeck")
    daemon.http.post(CHAT, json={"messages": [{"role": "user", "content": ["xylophone", 5]}]})
    log = daemon.log.read_text()
    assert "xylophone" not in log
    assert daemon.token not in log


def test_open_inference_opens_inference_only(relaxed) -> None:
    for headers in ({}, {"authorization": "Bearer sk-anything"}):
        assert relaxed.bare.post(CHAT, json=HELLO, headers=headers).status_code == 200
        assert relaxed.bare.get("/v1/models", headers=headers).status_code == 200
        assert relaxed.bare.get("/v1/agents", headers=headers).status_code == 401
        assert relaxed.bare.delete("/v1/agents/security", headers=headers).status_code == 401
        assert relaxed.bare.get("/metrics", headers=headers).status_code == 401
        assert relaxed.bare.get("/v1/models/../agents", headers=headers).status_code == 401
    assert relaxed.bare.get("/health").json() == {"status": "ok"}


def test_allowed_origin_and_host(relaxed) -> None:
    origin = {"origin": "https://app.example"}
    asked = relaxed.bare.options(CHAT, headers={**origin, "access-control-request-method": "POST"})
    assert asked.status_code == 200
    answer = relaxed.bare.get("/v1/models", headers={**origin, "host": "box.local:99"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    refused = relaxed.bare.options(
        CHAT, headers={"origin": "https://evil.example", "access-control-request-method": "POST"}
    )
    assert refused.status_code == 403


def test_body_limit(relaxed) -> None:
    content = json.dumps({**HELLO, "padding": "x" * 100_000}).encode()
    kind = {"content-type": "application/json"}
    declared = relaxed.http.post(CHAT, content=content, headers=kind)
    assert declared.status_code == 413
    assert declared.json()["error"]["code"] == "body_too_large"

    def pieces():
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]

    undeclared = relaxed.http.post(CHAT, content=pieces(), headers=kind)
    assert undeclared.status_code == 413


def test_full_queue_says_when_to_come_back(relaxed) -> None:
    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=relaxed.url, timeout=300, trust_env=False) as client:
            body = {**HELLO, "max_tokens": 150, "logit_bias": {str(END_TOKEN): -100}}
            return await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(8)))

    answers = asyncio.run(burst())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        assert answer.json()["error"]["code"] == "overloaded"
        assert int(answer.headers["retry-after-ms"]) > 0
        assert "x-should-retry" not in answer.headers


def test_token_file_that_is_no_secret_is_refused(launch, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "token").write_text("short\n")
    process = launch(home)
    _, problem = process.communicate(timeout=120)
    assert process.returncode == 5
    assert "token" in problem


def test_token_file_that_is_a_link_is_refused(launch, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (tmp_path / "elsewhere").write_text("a" * 40)
    (home / "token").symlink_to(tmp_path / "elsewhere")
    process = launch(home)
    assert process.wait(timeout=120) == 5
