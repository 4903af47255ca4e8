"""Transcripts that are read in the background: the same as one append, across restarts, and only while nobody else is there."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from agentmem.blockpool.index import TurnRow
from agentmem.engine.job import JobInfo
from agentmem.engine.request import ChatRequest, Delta, Event
from agentmem.errors import BadRequest, ConversationBusy, NotFound
from agentmem.runtime import Runtime
from tests.engine.turns import words
from tests.runtime.agents import Running, ask, memory, open_runtime, turn

PART = 64
BUDGET, BLOCK = 320, 256
POLICIES = {
    "episodic": {"kind": "episodic", "budget_tokens": BUDGET, "block_tokens": BLOCK, "episodes": 2},
    "window": {"kind": "window", "recent": 256, "sinks": 4},
}


def transcript(seed: int, messages: int = 6, length: int = 30) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"role": ("user", "assistant")[i % 2], "content": words(rng, length)} for i in range(messages)]


def request(agent: str, messages: list[dict[str, Any]]) -> ChatRequest:
    return ChatRequest(agent, [dict(m) for m in messages], history="server")


def finished(runtime: Runtime, job: JobInfo) -> JobInfo:
    deadline = time.monotonic() + 120
    while (now := runtime.jobs.show(job["id"], job["namespace"]))["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, now
        time.sleep(0.01)
    return now


def log(runtime: Runtime, agent: str) -> tuple[list[int], list[dict[str, Any]]]:
    """What an agent's session holds: token ids, and messages."""

    def look() -> tuple[list[int], list[dict[str, Any]]]:
        conversation = runtime._memory.find("default", agent).spoken["default"].conversation
        return list(conversation.ids), list(conversation.messages)

    return runtime._call(look)


def turns(runtime: Runtime, agent: str = "ada") -> list[TurnRow]:
    """The committed turns of an agent's session."""
    return runtime._call(lambda: list(runtime._memory.find("default", agent).spoken["default"].row.turns))


def read_by(made: list[TurnRow]) -> list[int]:
    """Tokens that each of a job's turns read; the figures of the last are of all since the start, so it is what it added."""
    own = [int(t.stats["prefilled_tokens"]) for t in made[:-1]]
    return [*own, int(made[-1].stats["prompt_tokens"] - made[-2].stats["prompt_tokens"])]


def reached(runtime: Runtime, job: JobInfo, tokens: int) -> JobInfo:
    """The job once it has read so many tokens."""
    deadline = time.monotonic() + 60
    while (now := runtime.jobs.show(job["id"]))["tokens_read"] < tokens:
        assert time.monotonic() < deadline, now
        assert now["state"] in ("queued", "running"), now
        time.sleep(0.002)
    return now


def opened(home: Path, part: int = PART, **options: Any) -> Runtime:
    """A runtime whose jobs are committed every `part` tokens."""
    runtime = open_runtime(home, **{"chunk_tokens": 32, "ram_budget": 32 << 20, **options})
    runtime._engine.planner._part = part
    return runtime


def test_a_job_leaves_what_an_append_leaves(tmp_path: Path) -> None:
    said, replies, logs = transcript(1), [], []
    for home in ("plain", "jobbed"):
        runtime = opened(tmp_path / home)
        try:
            if home == "plain":
                total = runtime.append(request("ada", said))["prompt_tokens"]
            else:
                done = finished(runtime, runtime.jobs.add(request("ada", said)))
                assert (done["state"], done["error"], done["messages"]) == ("done", None, len(said))
                assert done["tokens_read"] == done["tokens_total"] == total > 8 * PART
                assert read_by(turns(runtime)) == [PART] * (total // PART) + [total % PART] * (
                    total % PART > 0
                )
            logs.append(log(runtime, "ada"))
            assert runtime.agent("ada")["turns"] == 1
            replies.append(turn(runtime, "ada", "so?", max_tokens=12, top_logprobs=2))
        finally:
            runtime.close()
    assert logs[0] == logs[1]
    # Logarithms of probabilities tell of every bit of the state.
    assert replies[0].logprobs == replies[1].logprobs
    assert memory(replies[0])["exact_tokens"] == memory(replies[1])["exact_tokens"]


@pytest.mark.slow
def test_a_job_goes_on_after_a_restart_and_reads_nothing_twice(tmp_path: Path) -> None:
    said = transcript(2, 14)
    runtime = opened(tmp_path)
    job = runtime.jobs.add(request("ada", said))
    reached(runtime, job, 4 * PART)
    runtime.close()
    runtime = opened(tmp_path)
    try:
        done = finished(runtime, job)
        assert (done["state"], done["id"]) == ("done", job["id"])
        assert [m["content"] for m in log(runtime, "ada")[1]] == [m["content"] for m in said]
        made = turns(runtime)
        assert len(made) > 8
        assert sum(read_by(made)) == done["tokens_total"]
    finally:
        runtime.close()


def test_a_job_that_was_read_and_not_noted_is_not_read_again(tmp_path: Path) -> None:
    said = transcript(3, 2)
    runtime = opened(tmp_path)
    job = runtime.jobs.add(request("ada", said))
    path = tmp_path / "jobs" / f"{job['id']}.json"
    queued = path.read_bytes()
    finished(runtime, job)
    before = log(runtime, "ada")
    assert b'"said"' in queued
    assert b'"said"' not in path.read_bytes()
    runtime.close()
    path.write_bytes(queued)
    runtime = opened(tmp_path)
    try:
        assert finished(runtime, job)["state"] == "done"
        assert log(runtime, "ada") == before
    finally:
        runtime.close()


def test_turns_of_the_session_are_refused_until_the_job_is_cancelled(tmp_path: Path) -> None:
    runtime = opened(tmp_path)
    try:
        turn(runtime, "ada", "hello")
        archive = runtime.transfer.export("ada")
        job = runtime.jobs.add(request("ada", transcript(4, 40)))
        read = reached(runtime, job, 2 * PART)["tokens_read"]
        for attempt in (
            lambda: turn(runtime, "ada", "so?"),
            lambda: runtime.append(request("ada", transcript(5, 1))),
            lambda: runtime.transfer.admit(archive, force=True),
        ):
            with pytest.raises(ConversationBusy, match=job["id"]):
                attempt()
        assert turn(runtime, "ada", "so?", session="other").finish_reason
        with pytest.raises(NotFound):
            runtime.jobs.cancel(job["id"], "elsewhere")
        ended = runtime.jobs.cancel(job["id"])
        assert ended["state"] == "cancelled"
        assert read <= ended["tokens_read"] < (ended["tokens_total"] or 0)
        assert runtime.jobs.cancel(job["id"]) == ended
        held = len(log(runtime, "ada")[0])
        assert held >= ended["tokens_read"] + 10
        assert turn(runtime, "ada", "so?").finish_reason
    finally:
        runtime.close()


@pytest.mark.slow
def test_a_job_stands_still_while_somebody_else_speaks(tmp_path: Path) -> None:
    runtime = opened(tmp_path, part=4096)
    try:
        job = runtime.jobs.add(request("ada", transcript(6, 40)))
        reached(runtime, job, PART)
        seen: list[int] = []

        def at(event: Event) -> None:
            if isinstance(event, Delta):
                seen.append(sum(s.history for s in runtime._engine.active if s.background))

        Running(runtime, ask("bob", "who keeps the oil?", max_tokens=24), at).end()
        assert len(seen) > 3
        assert min(seen) == max(seen) > 0
        assert reached(runtime, job, seen[0] + PART)["state"] == "running"
    finally:
        runtime.close()


@pytest.mark.slow
def test_a_job_makes_room_for_whoever_does_not_fit_beside_it(tmp_path: Path) -> None:
    runtime = opened(tmp_path, part=4096, max_batch=1)
    try:
        job = runtime.jobs.add(request("ada", transcript(7, 24)))
        for n in range(3):
            reached(runtime, job, (2 + n) * PART)
            assert turn(runtime, "bob", f"question {n}", max_tokens=3).finish_reason
        done = finished(runtime, job)
        assert done["state"] == "done"
        made = turns(runtime)
        assert len(made) >= 4
        assert [m["content"] for m in log(runtime, "ada")[1]] == [m["content"] for m in transcript(7, 24)]
        assert sum(read_by(made)) == done["tokens_total"]
    finally:
        runtime.close()


def test_jobs_of_one_session_follow_each_other(tmp_path: Path) -> None:
    runtime = opened(tmp_path)
    try:
        said = [transcript(seed, 2) for seed in (1, 2, 3)]
        jobs = [runtime.jobs.add(request("ada", one)) for one in said]
        assert [finished(runtime, job)["state"] for job in jobs] == ["done"] * 3
        assert [m["content"] for m in log(runtime, "ada")[1]] == [m["content"] for one in said for m in one]
        assert runtime.jobs.counts() == {"queued": 0, "running": 0, "done": 3, "failed": 0, "cancelled": 0}
        assert [job["id"] for job in runtime.jobs.all()] == [job["id"] for job in jobs]
        assert runtime.jobs.all("elsewhere") == []
    finally:
        runtime.close()


def test_forgetting_an_agent_ends_its_jobs_and_leaves_nothing_of_them(tmp_path: Path) -> None:
    runtime = opened(tmp_path)
    try:
        job = runtime.jobs.add(request("ada", transcript(8, 40)))
        other = runtime.jobs.add(request("bob", transcript(9, 1)))
        reached(runtime, job, PART)
        runtime.forget("ada")
        with pytest.raises(NotFound):
            runtime.jobs.show(job["id"])
        assert finished(runtime, other)["state"] == "done"
        assert [path.stem for path in (tmp_path / "jobs").iterdir()] == [other["id"]]
        assert [agent["agent"] for agent in runtime.agents()] == ["bob"]
    finally:
        runtime.close()


def test_agents_that_leave_no_plain_text_on_disk_have_no_jobs(tmp_path: Path) -> None:
    runtime = opened(tmp_path)
    try:
        runtime.create("sealed", {"encrypt": "file"})
        turn(runtime, "shy", "hello", persist=False)
        for agent in ("sealed", "shy"):
            with pytest.raises(BadRequest) as refused:
                runtime.jobs.add(request(agent, transcript(1, 1)))
            assert refused.value.param == "background"
        assert not (tmp_path / "jobs").exists()
    finally:
        runtime.close()


def test_a_transcript_that_fits_no_context_fails_alone(tmp_path: Path) -> None:
    runtime = opened(tmp_path, max_context=256)
    try:
        job = finished(runtime, runtime.jobs.add(request("ada", transcript(1))))
        assert job["state"] == "failed"
        assert "256" in (job["error"] or "")
        assert finished(runtime, runtime.jobs.add(request("ada", transcript(1, 1, 5))))["state"] == "done"
    finally:
        runtime.close()


def test_jobs_that_ended_go_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentmem.engine.jobs.MOST_ENDED", 2)
    runtime = opened(tmp_path)
    try:
        ids = [
            finished(runtime, runtime.jobs.add(request("ada", transcript(n, 1, 5))))["id"] for n in range(4)
        ]
        assert [job["id"] for job in runtime.jobs.all()] == ids[2:]
        assert {path.stem for path in (tmp_path / "jobs").iterdir()} == set(ids[2:])
    finally:
        runtime.close()
    monkeypatch.setattr("agentmem.engine.jobs.ENDED_DAYS", 0)
    (tmp_path / "jobs" / "job-broken.json").write_text("{")
    runtime = opened(tmp_path)
    try:
        assert runtime.jobs.all() == []
    finally:
        runtime.close()


@pytest.mark.slow(minutes=0.3)
@pytest.mark.parametrize("kind", ["episodic", "window"])
def test_a_transcript_of_many_budgets_is_read_into_the_same_room(tmp_path: Path, kind: str) -> None:
    runtime = opened(tmp_path, part=2048, episode_encoder="hash512")
    runtime.create("reader", {"memory": POLICIES[kind]})
    pool = runtime._pool
    try:
        done = finished(runtime, runtime.jobs.add(request("reader", transcript(10, 20, 55))))
        assert done["state"] == "done"
        assert done["tokens_read"] > 16 * BUDGET
        most = pool.geometry.worst_slots(BUDGET + 3 * BLOCK + pool.geometry.page_tokens)
        assert kind == "window" or 0 < pool.slots.peak <= most
        assert runtime.agent("reader")["turns"] == 1
        following = turn(runtime, "reader", "go on", max_tokens=8)
        assert memory(following)["prefilled_tokens"] < 64
        assert runtime.explain("reader")["reason"] == "extended"
    finally:
        runtime.close()
