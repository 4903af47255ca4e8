"""What a hostile page or program sends: forms, names that are paths, numbers out of every bound, other people's prompts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.home import Home
from agentmem.server.security import Lock
from agentmem.server.tokens import Tokens
from agentmem.settings import Settings

CHAT = "/v1/chat/completions"
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain")
BIGGEST = 2**63
SECRET = b"the-secret-of-this-home"


def codes(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("kind", FORMS)
def test_a_form_of_a_foreign_page_changes_nothing(daemon, kind: str) -> None:
    """What a page may post without asking first: no token, no JSON, its own Origin. Each alone is reason enough."""
    daemon.chat("formed", "Stay as you are.")
    turns = daemon.http.get("/v1/agents/formed").json()["turns"]
    content = json.dumps({"messages": [{"role": "user", "content": "x"}], "user": "formed"}).encode()
    for path in (CHAT, "/v1/agents/formed/evict", "/v1/agents/formed/append", "/v1/store/prune"):
        page = {"content-type": kind, "origin": "https://evil.example"}
        assert codes(daemon.http.post(path, content=content, headers=page)) == (403, "origin_not_allowed")
        bare = {"content-type": kind}
        assert codes(daemon.bare.post(path, content=content, headers=bare)) == (401, "invalid_api_key")
        assert codes(daemon.http.post(path, content=content, headers=bare)) == (415, "unsupported_media_type")
    agent = daemon.http.get("/v1/agents/formed").json()
    assert (agent["turns"], agent["state"]) == (turns, "hot")


@pytest.mark.parametrize(
    "name", ["..", "../../token", "/etc/passwd", "a\\..\\b", "~", ".hidden", "a/../../b"]
)
@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("POST", "/v1/agents", "agent"),
        ("POST", "/v1/agents/formed/fork", "agent"),
        ("POST", "/v1/agents/formed/fork", "session"),
        ("POST", "/v1/agents/formed/append", "session"),
        ("POST", "/v1/store/prune", "namespace"),
        ("POST", "/v1/compose/verify", "namespace"),
    ],
)
def test_names_in_bodies_are_no_paths(daemon, method: str, path: str, key: str, name: str) -> None:
    body = {"agent": "fine", "text": "x", "older_s": 1e9, "dry_run": True, key: name}
    response = daemon.http.request(method, path, json=body)
    assert codes(response) == (400, "invalid_value"), response.text


def resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives that a schema stands for."""
    if "$ref" in schema:
        return resolved(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    inner = schema.get("anyOf") or schema.get("oneOf")
    return [found for part in inner for found in resolved(part, schemas)] if inner else [schema]


def example(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """Something that the schema allows: the first alternative, required fields only."""
    first = resolved(schema, schemas)[0]
    if "const" in first or "enum" in first:
        return first.get("const", first.get("enum", [None])[0])
    match first.get("type"):
        case "object":
            wanted = {**{name: {} for name in first.get("required", ())}, **first.get("properties", {})}
            # Each part of a message may be left out, but not all of them.
            content = {"content": "x"} if "content" in wanted else {}
            fixed = {n: p["const"] for n, p in first.get("properties", {}).items() if "const" in p}
            return {**content, **fixed, **{n: example(wanted[n], schemas) for n in first.get("required", ())}}
        case "array":
            return [example(first.get("items", {}), schemas)]
        case "integer" | "number":
            return max(int(first.get("minimum", 0)), 1)
        case "boolean":
            return False
    return "x"


def integers(
    schema: dict[str, Any], schemas: dict[str, Any]
) -> Iterator[tuple[list[str], dict[str, Any], bool]]:
    """Every integer field below a schema: where it is, an example of all around it, and whether it may be negative."""
    for kind in resolved(schema, schemas):
        if kind.get("type") != "object":
            continue
        around = example(kind, schemas)
        for name, inner in kind.get("properties", {}).items():
            for found in resolved(inner, schemas):
                if found.get("type") == "integer":
                    yield [name], around, found.get("minimum", found.get("exclusiveMinimum", 0)) < 0
            for path, below, signed in integers(inner, schemas):
                yield [name, *path], {**around, name: below}, signed


def with_value(body: dict[str, Any], path: list[str], value: int) -> dict[str, Any]:
    first, *rest = path
    return {**body, first: with_value(body[first], rest, value) if rest else value}


def test_integers_out_of_bounds_are_refused_by_every_field(daemon) -> None:
    described = daemon.http.get("/openapi.json").json()
    schemas, tried, wrong = described["components"]["schemas"], set(), []
    for route, methods in described["paths"].items():
        for method, facts in methods.items():
            schema = facts.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            for path, body, signed in integers(schema, schemas) if schema else ():
                for value in (BIGGEST, -BIGGEST - 1, 10**400) + (() if signed else (-1,)):
                    response = daemon.http.request(
                        method,
                        route.format(agent="nobody", session="s", name="n", id="i", item="i"),
                        json=with_value(body, path, value),
                    )
                    error = response.json().get("error") or {}
                    param = error.get("param") or error.get(
                        "message", ""
                    )  # Anthropic's errors name no field apart
                    if response.status_code != 400 or path[-1] not in param:
                        wrong.append((route, ".".join(path), value, response.status_code, param))
                    tried.add(path[-1])
    assert wrong == []
    assert {"max_tokens", "top_k", "seed", "n", "top_logprobs", "quota_bytes", "at", "budget_tokens"} <= tried


def test_a_query_is_checked_like_a_body(daemon) -> None:
    for query in (
        {"namespace": "../x"},
        {"namespace": ""},
        {"namespace": "a" * 1000},
        {"namespace": "a\x00"},
    ):
        assert codes(daemon.http.get("/v1/agents", params=query)) == (400, "invalid_value")
    # An archive must not be read before its flags are understood.
    octets = {"content-type": "application/octet-stream"}
    response = daemon.http.post("/v1/agents/import?trust=2", content=b"x", headers=octets)
    assert codes(response) == (400, "invalid_value")


class Untouchable(bytes):
    """Bytes that nobody may compare in a time that depends on them."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared byte by byte")

    def __hash__(self) -> int:
        raise AssertionError("looked up")


@pytest.mark.parametrize(
    ("shown", "status"), [(SECRET, 200), (b"another-one", 403), (SECRET[:-1], 401), (SECRET[:-1] + b"x", 401)]
)
def test_tokens_are_compared_in_constant_time(shown: bytes, status: int, tmp_path: Path) -> None:
    answered: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answered.append(200)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answered.append(message["status"])

    tokens = Tokens(Home(tmp_path).prepare())
    tokens.all, tokens.inference = Untouchable(SECRET), Untouchable(b"another-one")
    lock = Lock(app, Settings(), tokens)
    scope = {"type": "http", "method": "GET", "path": "/v1/agents", "headers": [(b"x-api-key", shown)]}
    asyncio.run(lock(scope, None, send))  # type: ignore[arg-type]
    assert answered == [status]
