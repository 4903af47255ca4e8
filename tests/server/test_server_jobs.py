"""`/v1/jobs`: transcripts that are read in the background, over HTTP and by both clients."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from agentmem.client import AgentMemClient, AsyncAgentMemClient
from agentmem.errors import ConversationBusy, NotFound

STORY = "The ferryman counts the lanterns on the other bank, and rings once for each that is out. "
FIELDS = {
    "id", "agent", "session", "namespace", "state", "tokens_total", "tokens_read", "messages", "error", "created",
    "updated",
}  # fmt: skip


def ended(client: AgentMemClient, job: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (now := client.job(job["id"]))["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return now


def test_a_transcript_is_taken_at_once_and_read_later(daemon) -> None:
    place = "/v1/agents/ferry/append"
    answer = daemon.http.post(place, json={"text": STORY * 20, "background": True})
    assert answer.status_code == 202
    job = answer.json()
    assert set(job) == FIELDS
    assert (job["agent"], job["session"], job["namespace"], job["messages"]) == (
        "ferry",
        "default",
        "default",
        1,
    )
    with AgentMemClient(home=daemon.home) as client:
        done = ended(client, job)
        assert (done["state"], done["error"]) == ("done", None)
        assert done["tokens_read"] == done["tokens_total"] > len(STORY) * 20
        assert job["id"] in [one["id"] for one in client.jobs()]
        assert client.cancel_job(job["id"])["state"] == "done"
        usage = client.chat("ferry", "How many?", max_tokens=2).usage
        assert usage["prompt_tokens_details"]["cached_tokens"] >= done["tokens_read"]
    assert daemon.metric("agentmem_jobs_done") >= 1


def test_a_session_with_a_job_is_refused_with_409_on_every_way_to_speak(daemon) -> None:
    with AgentMemClient(home=daemon.home) as client:
        # Two of them: while the first is read the second waits, however fast that is.
        first = client.append("toll", STORY * 60, background=True, session="s")
        second = client.append("toll", STORY * 60, background=True, session="s")
        who = {"agent": "toll", "session": "s", "history": "server"}
        body = {"messages": [{"role": "user", "content": "so?"}], "max_tokens": 2, "agentmem": who}
        for fields in ({}, {"stream": True}):
            refused = daemon.http.post("/v1/chat/completions", json={**body, **fields})
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conversation_busy")
        with pytest.raises(ConversationBusy):
            client.append("toll", "more", session="s")
        assert client.chat("toll", "so?", session="t", max_tokens=2).finish_reason
        assert client.cancel_job(second["id"])["state"] == "cancelled"
        assert ended(client, first)["state"] == "done"
        assert client.chat("toll", "so?", session="s", max_tokens=2).finish_reason


def test_jobs_are_seen_in_their_namespace_only(daemon) -> None:
    with (
        AgentMemClient(home=daemon.home, namespace="north") as north,
        AgentMemClient(home=daemon.home) as here,
    ):
        job = north.append("ferry", STORY, background=True)
        assert ended(north, job)["namespace"] == "north"
        assert job["id"] not in [one["id"] for one in here.jobs()]
        for look in (here.job, here.cancel_job):
            with pytest.raises(NotFound):
                look(job["id"])


def test_the_other_client_has_jobs_too(daemon) -> None:
    async def run() -> None:
        async with AsyncAgentMemClient(home=daemon.home) as client:
            job = await client.append("slow", STORY, background=True)
            assert job["id"] in [one["id"] for one in await client.jobs()]
            assert (await client.cancel_job(job["id"]))["state"] in ("cancelled", "done")
            assert (await client.job(job["id"]))["state"] in ("cancelled", "done")

    asyncio.run(run())


def test_background_must_be_true_or_false(daemon) -> None:
    refused = daemon.http.post("/v1/agents/ferry/append", json={"text": "x", "background": "yes"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "background")
