"""Two tokens: what the one for inference opens, and what happens when one is replaced."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentmem.client import AgentMemClient
from agentmem.errors import Unauthorized
from agentmem.server.security import INFERENCE

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "user": "tokens"}


def shown(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def inference_token(daemon: Any) -> str:
    return (daemon.home / "inference-token").read_text().strip()


def test_the_inference_token_is_a_file_of_its_own(daemon) -> None:
    assert stat.S_IMODE((daemon.home / "inference-token").stat().st_mode) == 0o600
    assert len(inference_token(daemon)) >= 32
    assert inference_token(daemon) != daemon.token


def test_it_opens_every_inference_route_and_no_other(daemon) -> None:
    headers = shown(inference_token(daemon))
    refused = set()
    for path, methods in daemon.http.get("/openapi.json").json()["paths"].items():
        for method in methods:
            response = daemon.bare.request(
                method, path.format(agent="a", session="s", name="m", id="i", item="i"), headers=headers
            )
            if response.status_code == 403:
                assert response.json()["error"]["code"] == "insufficient_scope"
                refused.add(path)
            else:
                assert path == "/health" or INFERENCE.fullmatch(
                    path.format(name="m", agent="a", session="s", id="i", item="i")
                ), path
    assert {"/v1/agents", "/v1/agents/{agent}", "/v1/store", "/metrics", "/v1/token/rotate"} <= refused
    assert not {CHAT, "/v1/models", "/v1/models/{name}", "/health"} & refused
    assert daemon.bare.post(CHAT, json=HELLO, headers=headers).status_code == 200
    assert daemon.bare.get("/health", headers=headers).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("path", "opens"),
    [
        ("/v1/completions", True),
        ("/v1/responses", True),
        ("/v1/responses/resp_1/input_items", True),
        ("/v1/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/v1/embeddings", True),
        ("/v1/models/%2e%2e/agents", True),
        ("/v1/messages/batches", False),
        ("/v1/agents", False),
        ("/v1/chat/completions/%2e%2e/agents", False),
        ("//v1/chat/completions", False),
        ("/openapi.json", False),
    ],
)
def test_what_counts_as_inference(daemon, path: str, opens: bool) -> None:
    """A path that is let in, and that is no route, is not found; it is never another route."""
    url = httpx.URL(daemon.url).copy_with(raw_path=path.encode())
    response = daemon.bare.get(url, headers=shown(inference_token(daemon)))
    assert (response.status_code != 403) is opens
    if opens:
        assert response.status_code in (404, 405)


@pytest.fixture
def own(start, tmp_path: Path):
    daemon = start(tmp_path / "home")
    yield daemon
    daemon.stop()


@pytest.mark.slow
def test_rotating_refuses_the_old_token_at_once(own) -> None:
    old, old_inference = own.token, inference_token(own)
    client = AgentMemClient(home=own.home)
    assert client.rotate_token("inference") == {"scope": "inference", "rotated": True}
    assert own.bare.get("/v1/models", headers=shown(old_inference)).status_code == 401
    assert own.bare.get("/v1/models", headers=shown(inference_token(own))).status_code == 200
    assert client.rotate_token("all")["scope"] == "all"
    with pytest.raises(Unauthorized):
        client.agents()
    client.close()
    assert own.bare.get("/v1/agents", headers=shown(old)).status_code == 401
    new = (own.home / "token").read_text().strip()
    assert new not in (old, inference_token(own))
    assert stat.S_IMODE((own.home / "token").stat().st_mode) == 0o600
    assert own.bare.get("/v1/agents", headers=shown(new)).status_code == 200
    with AgentMemClient(home=own.home) as fresh:
        assert fresh.agents() == []
    log = own.log.read_text()
    assert not any(secret in log for secret in (old, new, old_inference, inference_token(own)))


def test_only_the_token_that_opens_all_rotates(daemon) -> None:
    before = daemon.token, inference_token(daemon)
    for headers, status in (({}, 401), (shown(inference_token(daemon)), 403)):
        for scope in ("all", "inference"):
            response = daemon.bare.post("/v1/token/rotate", json={"scope": scope}, headers=headers)
            assert response.status_code == status
    assert daemon.http.post("/v1/token/rotate", json={"scope": "control"}).status_code == 400
    assert ((daemon.home / "token").read_text().strip(), inference_token(daemon)) == before
