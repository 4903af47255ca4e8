"""Below HTTP: heads and bodies that never end, heads that are too large, and what is no HTTP at all."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def hasty(start, tmp_path_factory: pytest.TempPathFactory):
    """A daemon that waits for half a second only."""
    daemon = start(tmp_path_factory.mktemp("hasty") / "home", "--receive-timeout-s", "0.5")
    yield daemon
    daemon.stop()


@contextmanager
def connected(daemon: Any) -> Iterator[socket.socket]:
    host, port = daemon.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        yield connection


def head(daemon: Any, *lines: str, method: str = "POST") -> bytes:
    host = daemon.url.removeprefix("http://")
    first = (f"{method} {CHAT} HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {daemon.token}")
    return "".join(f"{line}\r\n" for line in (*first, *lines)).encode()


def answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Everything until the daemon closes: status and error."""
    text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    top, _, body = text.partition("\r\n\r\n")
    assert re.search(r"^content-type: application/json", top, re.IGNORECASE | re.MULTILINE), text
    return int(top.split()[1]), json.loads(body)["error"]


def test_a_head_that_never_ends(hasty) -> None:
    with connected(hasty) as connection:
        connection.sendall(head(hasty))
        status, error = answer(connection)
    assert (status, error["code"]) == (408, "request_timeout")


def test_a_header_now_and_then_wins_no_time(hasty) -> None:
    with connected(hasty) as connection:
        connection.sendall(head(hasty))
        connection.settimeout(0.1)
        for i in range(600):
            with suppress(TimeoutError):
                connection.sendall(f"x-{i}: 1\r\n".encode())
                assert connection.recv(12) == b"HTTP/1.1 408"
                return
    pytest.fail("the daemon waited for all of them")


def test_a_connection_that_says_nothing_is_closed(hasty) -> None:
    with connected(hasty) as connection:
        assert connection.recv(1) == b""


def test_a_body_that_never_ends(hasty) -> None:
    lines = ("Content-Type: application/json", "Content-Length: 1000", "Connection: close", "")
    with connected(hasty) as connection:
        connection.sendall(head(hasty, *lines) + b'{"messages"')
        status, error = answer(connection)
    assert (status, error["code"]) == (408, "request_timeout")


def test_an_upload_that_stops_leaves_nothing(hasty) -> None:
    before = sorted(path.name for path in (hasty.home / "store").iterdir())
    lines = ("Content-Type: application/octet-stream", "Content-Length: 1000", "Connection: close", "")
    with connected(hasty) as connection:
        connection.sendall(head(hasty, *lines).replace(CHAT.encode(), b"/v1/agents/import") + b"x")
        status, error = answer(connection)
    assert (status, error["code"]) == (408, "request_timeout")
    assert sorted(path.name for path in (hasty.home / "store").iterdir()) == before


def test_the_rest_of_a_refused_body_is_not_awaited_for_ever(hasty) -> None:
    with connected(hasty) as connection:
        connection.sendall(head(hasty, "Content-Type: text/plain", "Content-Length: 1000", "") + b"x")
        assert connection.recv(65536).startswith(b"HTTP/1.1 415")
        while connection.recv(65536):
            pass  # ends: the daemon closes


def test_patient_requests_still_get_their_answers(hasty) -> None:
    """The limit is for what the client sends, not for what it is sent, and not for a pause between requests."""
    for _ in range(2):
        assert hasty.chat("patient", "hello", max_tokens=2)["usage"]["completion_tokens"]
        time.sleep(0.7)
    assert hasty.http.get("/health").status_code == 200


def test_ten_thousand_headers(daemon) -> None:
    with connected(daemon) as connection:
        connection.sendall(
            head(daemon, *(f"x-{i}: 1" for i in range(10_000)), "Connection: close", "", method="GET")
        )
        status, error = answer(connection)
    assert (status, error["code"]) == (431, "head_too_large")


def test_many_small_headers(daemon) -> None:
    response = daemon.http.get("/health", headers={f"x{i}": "" for i in range(300)})
    assert response.status_code == 431
    assert response.json()["error"]["code"] == "head_too_large"


def test_one_huge_header(daemon) -> None:
    with connected(daemon) as connection:
        connection.sendall(head(daemon, "x-long: " + "a" * 1_000_000))
        status, error = answer(connection)
    assert (status, error["code"]) == (431, "head_too_large")


@pytest.mark.parametrize("raw", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET /\r\n\r\n", b"hello\r\n\r\n"])
def test_what_is_no_http(daemon, raw: bytes) -> None:
    with connected(daemon) as connection:
        connection.sendall(raw)
        status, error = answer(connection)
    assert (status, error["code"]) == (400, "invalid_http")


def test_a_hundred_megabytes_are_refused_before_they_are_read(daemon) -> None:
    with connected(daemon) as connection:
        connection.sendall(
            head(
                daemon, "Content-Type: application/json", "Content-Length: 100000000", "Connection: close", ""
            )
        )
        status, error = answer(connection)
    assert (status, error["code"]) == (413, "body_too_large")


def test_a_hundred_megabytes_in_pieces(daemon) -> None:
    lines = ("Content-Type: application/json", "Transfer-Encoding: chunked", "Connection: close", "")
    piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    with connected(daemon) as connection:
        connection.sendall(head(daemon, *lines))
        try:
            for _ in range(100):
                connection.sendall(piece)
        except OSError:
            pass  # the daemon closed while we were still sending
        else:
            assert connection.recv(12) == b"HTTP/1.1 413"
    assert daemon.http.get("/health").json()["status"] == "ok"
