"""Documents: named by a part of a content, in every API, they are their text, read once for all that begin with it."""

from __future__ import annotations

from typing import Any

import pytest

SPEC = (
    "Section 4. The harbour light burns from dusk to dawn, and the keeper enters every ship into the book. "
    * 3
)
PART = {"type": "document", "name": "spec.md"}
WHERE = {"namespace": "documents"}


@pytest.fixture(scope="module", autouse=True)
def _registered(daemon) -> None:
    reply = daemon.http.put("/v1/documents/spec.md", params=WHERE, json={"text": SPEC})
    assert reply.status_code == 200, reply.text


def ask(daemon, route: str, agent: str, **body: Any) -> dict[str, Any]:
    headers = {"x-agentmem-namespace": "documents", "x-agentmem-agent": agent}
    reply = daemon.http.post(route, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()["usage"]["agentmem"]


def test_a_document_named_is_its_text_and_read_once_for_all(daemon) -> None:
    def messages(content: Any) -> list[dict[str, Any]]:
        return [{"role": "system", "content": content}, {"role": "user", "content": "When does it burn?"}]

    chat = "/v1/chat/completions"
    first = ask(daemon, chat, "reader", messages=messages([PART]), max_tokens=2)
    assert first["exact_tokens"] < 100
    # Another agent names it in another way, or brings its text along.
    for n, content in enumerate(([{"type": "file", "file": {"file_id": "spec.md"}}], SPEC)):
        other = ask(daemon, chat, f"other-{n}", messages=messages(content), max_tokens=2)
        assert other["exact_tokens"] >= len(SPEC)
    system = [{"type": "document", "source": {"type": "file", "file_id": "spec.md"}}]
    user = [{"role": "user", "content": "When does it burn?"}]
    third = ask(daemon, "/v1/messages", "third", system=system, messages=user, max_tokens=2)
    assert third["exact_tokens"] >= len(SPEC)
    items = [
        {"role": "system", "content": [{"type": "input_file", "file_id": "spec.md"}]},
        {"role": "user", "content": "When does it burn?"},
    ]
    fourth = ask(daemon, "/v1/responses", "fourth", input=items, max_output_tokens=2)
    assert fourth["exact_tokens"] >= len(SPEC)
    appended = daemon.http.post(
        "/v1/agents/fifth/append", params=WHERE, json={"messages": [{"role": "system", "content": [PART]}]}
    ).json()
    assert appended["agentmem"]["exact_tokens"] >= len(SPEC)


def test_its_text_can_be_read(daemon) -> None:
    assert daemon.http.get("/v1/documents/spec.md", params=WHERE).json() == {"name": "spec.md", "text": SPEC}
    assert daemon.http.get("/v1/documents/none.md", params=WHERE).status_code == 404


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_document_that_is_not_there_is_said(daemon, route: str) -> None:
    content = [{"type": "document", "name": "none.md"}]
    said = [{"role": "user", "content": content}]
    body = {"input": said} if route == "/v1/responses" else {"messages": said, "max_tokens": 1}
    reply = daemon.http.post(route, json=body, headers={"x-agentmem-namespace": "documents"})
    assert reply.status_code == 404
    assert "none.md" in reply.json()["error"]["message"]
