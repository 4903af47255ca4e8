"""Many streams at once: each is whole, in order, and its own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

STREAMS = 64


def asked(number: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"Ship number {number} passes the cape at night."}],
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
        "agentmem": {"agent": f"ship-{number}", "namespace": "streams"},
    }


async def read(client: httpx.AsyncClient, number: int) -> tuple[str, dict[str, Any]]:
    """The text and the usage of one stream; fails where an event is missing or out of order."""
    lines: list[str] = []
    async with client.stream("POST", "/v1/chat/completions", json=asked(number)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [bool(chunk["choices"]) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] is not None for c in chunks[:-1]] == [False] * (
        len(chunks) - 2
    ) + [True]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks[:-1])
    return text, chunks[-1]["usage"]


def test_sixty_four_streams_stay_ordered_and_whole(daemon) -> None:
    async def all_of_them() -> list[tuple[str, dict[str, Any]]]:
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(
            base_url=daemon.url, headers=daemon.http.headers, timeout=120, limits=limits, trust_env=False
        ) as client:
            return await asyncio.gather(*(read(client, number) for number in range(STREAMS)))

    found = asyncio.run(all_of_them())
    assert {usage["agentmem"]["agent"] for _, usage in found} == {f"ship-{n}" for n in range(STREAMS)}
    for number, (text, usage) in enumerate(found):
        assert usage["agentmem"]["agent"] == f"ship-{number}"
        alone = asked(number) | {
            "stream": False,
            "agentmem": {"agent": "alone", "namespace": f"streams-{number}"},
        }
        if number % 8 == 0:
            reply = daemon.http.post("/v1/chat/completions", json=alone).json()
            assert text == reply["choices"][0]["message"]["content"]
