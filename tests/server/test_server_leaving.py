"""A client that leaves: decoding stops, and what was read stays remembered."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tiny_model import END_TOKEN

LONG_REPLY = 7000
PROMPT = "Write down every number from one to ten thousand, in words, and never stop. "
# Only the limit or a cancellation ends the reply.
NO_END = {str(END_TOKEN): -100}


def body(agent: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": LONG_REPLY,
        "logit_bias": NO_END,
        "agentmem": {"agent": agent},
    }


def generated_after(daemon, before: float) -> float:
    """Reply tokens of the turn that a client left, once it is over."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (count := daemon.metric("agentmem_generated_tokens_total")) > before:
            return count - before
        time.sleep(0.2)
    raise AssertionError("the turn never ended")


def check_left(daemon, agent: str, before: float) -> None:
    assert generated_after(daemon, before) < LONG_REPLY
    usage = daemon.chat(agent, PROMPT, max_tokens=1)["usage"]
    assert usage["agentmem"]["prefilled_tokens"] <= 1


def test_leaving_a_stream(daemon) -> None:
    before = daemon.metric("agentmem_generated_tokens_total")
    request = {**body("leaver"), "stream": True}
    with daemon.http.stream("POST", "/v1/chat/completions", json=request) as response:
        for line in response.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                break
    check_left(daemon, "leaver", before)


def test_leaving_while_waiting_for_a_whole_reply(daemon) -> None:
    before = daemon.metric("agentmem_generated_tokens_total")
    with (
        httpx.Client(base_url=daemon.url, headers=daemon.http.headers, trust_env=False) as impatient,
        pytest.raises(httpx.ReadTimeout),
    ):
        impatient.post("/v1/chat/completions", json=body("quitter"), timeout=1.5)
    check_left(daemon, "quitter", before)


@pytest.mark.slow
def test_stopping_the_daemon_ends_replies_properly(start, tmp_path: Path) -> None:
    daemon = start(tmp_path / "home")
    request = {**body("stopped"), "stream": True, "stream_options": {"include_usage": True}}
    events: list[str] = []
    with daemon.http.stream("POST", "/v1/chat/completions", json=request) as response:
        for line in response.iter_lines():
            events += [line.removeprefix("data: ")] if line.startswith("data: ") else []
            if len(events) == 5:
                daemon.process.terminate()
    assert events[-1] == "[DONE]"
    assert json.loads(events[-3])["choices"][0]["finish_reason"] == "length"
    assert 0 < json.loads(events[-2])["usage"]["completion_tokens"] < LONG_REPLY
    assert daemon.process.wait(timeout=60) == 0


def test_who_leaves_while_the_prompt_is_read_finds_it_read(daemon) -> None:
    story = (
        "The lighthouse keeper counts the ships that pass the cape, and writes their names into the book. "
        * 70
    )
    request = {
        "messages": [{"role": "user", "content": story}],
        "max_tokens": 4,
        "agentmem": {"agent": "returner", "namespace": "leaving"},
    }
    with daemon.http.stream("POST", "/v1/chat/completions", json=request | {"stream": True}) as response:
        assert response.headers["x-agentmem-cached-tokens"] == "0"  # planned, and about to be read
    again = daemon.http.post("/v1/chat/completions", json=request).json()["usage"]
    assert again["prompt_tokens"] > 6000
    assert again["prompt_tokens_details"]["cached_tokens"] >= 0.9 * again["prompt_tokens"]
    last = daemon.http.get("/v1/agents/returner/explain", params={"namespace": "leaving"}).json()
    assert last["turn"] == 2
