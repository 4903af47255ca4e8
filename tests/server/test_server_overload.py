"""More requests than fit, at once: each is answered or told when to come back, and MLX stays inside its limit."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.conftest import Daemon, Start

pytestmark = pytest.mark.slow(minutes=0.2)

CLIENTS, TURNS = 16, 2
LIMIT = 16 << 20
FLAGS = {"--memory-limit": str(LIMIT), "--ram-budget": "4MiB", "--chunk-tokens": "256", "--queue-limit": "4"}


@pytest.fixture(scope="module")
def daemon(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """A daemon with little memory and a short queue."""
    flags = [word for pair in FLAGS.items() for word in pair]
    return start(tmp_path_factory.mktemp("overload") / "home", *flags)


def body(agent: str, letters: int, **fields: Any) -> dict[str, Any]:
    text = f"{agent}: " + "tide " * (letters // 5)
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 24,
        "agentmem": {"agent": agent},
        **fields,
    }


def test_sixteen_at_once_are_served_or_told_to_come_back(daemon: Daemon) -> None:
    def client(number: int) -> list[httpx.Response]:
        return [
            daemon.http.post("/v1/chat/completions", json=body(f"c{number}", 100 + 37 * number))
            for _ in range(TURNS)
        ]

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [response for turns in pool.map(client, range(CLIENTS)) for response in turns]
    statuses = Counter(response.status_code for response in answers)
    assert set(statuses) == {200, 429}
    for response in answers:
        if response.status_code == 429:
            assert 50 <= int(response.headers["retry-after-ms"]) <= 60_000
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "overloaded"
    health = daemon.http.get("/health").json()
    assert health["status"] == "ok"
    assert health["waiting"] == health["active"] == 0
    assert health["memory"]["peak_bytes"] <= LIMIT == health["memory"]["limit_bytes"]
    assert health["scheduler"]["itl_ms"] > 0


def test_a_client_that_comes_back_is_served(daemon: Daemon) -> None:
    """OpenAI's client waits as long as it is told, and tries again."""
    client = daemon.openai().with_options(max_retries=40)

    def ask(number: int) -> str:
        reply = client.chat.completions.create(
            model="default",
            max_tokens=8,
            messages=[{"role": "user", "content": "tide " * 60}],
            extra_body={"agentmem": {"agent": f"r{number}"}},
        )
        return str(reply.choices[0].finish_reason)

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert set(pool.map(ask, range(CLIENTS))) <= {"length", "stop"}


def test_what_can_never_fit_is_refused_at_once(daemon: Daemon) -> None:
    response = daemon.http.post("/v1/chat/completions", json=body("giant", 4000))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "memory_limit allows" in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert daemon.chat("giant", "short")["choices"]


def test_metrics_show_the_scheduler_and_the_memory(daemon: Daemon) -> None:
    daemon.chat("ada", "hello")
    assert daemon.metric("agentmem_scheduler_max_batch") == 16
    assert daemon.metric("agentmem_scheduler_itl_ms") > 0
    assert daemon.metric("agentmem_scheduler_prefetched_pages") >= 0
    assert daemon.metric("agentmem_memory_limit_bytes") == LIMIT
    assert daemon.metric("agentmem_turns_waiting") == 0


def test_too_little_memory_for_the_model_is_said_at_the_start(launch: Any, tmp_path: Any) -> None:
    process = launch(tmp_path / "home", "--memory-limit", "1MiB")
    assert process.wait(timeout=60) == 1
    assert "memory_limit allows 1048576" in process.stderr.read()
