"""What harnesses send turn after turn is remembered: all of a turn but its last message is reused by the next."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.harness import HARNESSES, NEXT, OUTPUT, Harness


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def daemon(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_daemon")


@pytest.mark.parametrize("harness", HARNESSES, ids=lambda one: one.name)
def test_every_turn_reuses_the_one_before(daemon, harness: Harness) -> None:
    replies: list[dict[str, Any]] = []
    before = 0
    for n in range(3):
        turn = harness.turn(n, replies)
        headers = turn.headers | {"x-agentmem-namespace": f"harness-{harness.name}"}
        response = daemon.http.post(turn.route, json=turn.body, headers=headers)
        assert response.status_code == 200, response.text
        replies.append(response.json())
        memory = replies[-1]["usage"]["agentmem"]
        assert memory["agent"] == harness.agent
        prompt = memory["exact_tokens"] + memory["prefilled_tokens"]
        # A token of the tiny model is a byte: what is new is the last message, the reply's end and the heads of both.
        new = len((OUTPUT, NEXT)[n - 1].encode()) + 64
        if n:
            assert memory["exact_tokens"] >= before
            assert memory["prefilled_tokens"] <= new
        before = prompt
    agents = daemon.http.get("/v1/agents", params={"namespace": f"harness-{harness.name}"}).json()["data"]
    assert [agent["agent"] for agent in agents] == [harness.agent]
    assert len(agents[0]["sessions"]) == 1
