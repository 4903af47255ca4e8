"""SIGKILL while a transcript is read in the background: it goes on, no message is lost or doubled, nothing is read twice."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agentmem.blockpool.index import Index, TurnRow
from tests.crash.daemon import Daemon, spawn
from tests.engine.turns import words
from tests.tiny_model import save_model

AGENT = "ada"
FLAGS = ("--disk-floor", "0", "--scrub-mb-s", "0", "--episode-encoder", "hash512")
PART = 2048
EPISODIC = {"kind": "episodic", "budget_tokens": 512, "block_tokens": 256, "episodes": 2}


def transcript() -> list[dict[str, Any]]:
    rng = random.Random(12)
    return [{"role": ("user", "assistant")[i % 2], "content": words(rng, 60)} for i in range(20)]


def state(daemon: Daemon, job: str) -> dict[str, Any]:
    return daemon.get(f"/v1/jobs/{job}")


def logged(home: Path) -> tuple[list[TurnRow], list[int], list[dict[str, Any]]]:
    """The turns of a home's only session, and the token ids and messages that they make."""
    index = Index(home / "store" / "index.sqlite", "any")
    rows = [s for s in index.sessions() if "#" not in s.name]
    index.close()
    ids: list[int] = []
    messages: list[dict[str, Any]] = []
    for turn in rows[0].turns:
        ids = [*ids[: turn.keep_tokens], *map(int, turn.ids)]
        messages = [*messages[: turn.keep_messages], *turn.messages]
    return rows[0].turns, ids, messages


def begun(home: Path, model: Path, policy: dict[str, Any]) -> tuple[Daemon, str]:
    daemon = Daemon(home, model, *FLAGS)
    daemon.post("/v1/agents", {"agent": AGENT, "policy": policy})
    body = {"messages": transcript(), "background": True}
    answer = daemon.http.post(f"/v1/agents/{AGENT}/append", json=body)
    assert answer.status_code == 202
    return daemon, str(answer.json()["id"])


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("policy", [{"kind": "full"}, EPISODIC], ids=lambda p: p["kind"])
def test_a_job_survives_kills_at_any_moment(tmp_path: Path, policy: dict[str, Any]) -> None:
    model, home, rng = save_model(tmp_path / "model"), tmp_path / "home", random.Random(7)
    calm = Daemon(tmp_path / "calm", model, *FLAGS)
    calm.post("/v1/agents", {"agent": AGENT, "policy": policy})
    calm.post(f"/v1/agents/{AGENT}/append", {"messages": transcript()})
    assert calm.stop() == 0
    daemon, job = begun(home, model, policy)
    kills = 0
    while kills < 4 and state(daemon, job)["state"] in ("queued", "running"):
        time.sleep(rng.uniform(0.05, 0.4))
        daemon.kill()
        kills += 1
        daemon = Daemon(home, model, *FLAGS)
    assert kills >= 2, "hardly anything was under way"
    while state(daemon, job)["state"] in ("queued", "running"):
        time.sleep(0.05)
    done = state(daemon, job)
    assert (done["state"], done["error"]) == ("done", None)
    assert daemon.post("/v1/store/verify", {"deep": True})["ok"]
    assert daemon.get(f"/v1/agents/{AGENT}")["turns"] == 1
    assert daemon.stop() == 0
    _, ids, messages = logged(tmp_path / "calm")
    made, got, said = logged(home)
    assert got == ids
    assert said == messages
    assert [m["content"] for m in said] == [m["content"] for m in transcript()]
    # Every part began where the one before it ended, so only what was not committed yet can have been read twice.
    ends = [int(turn.stats["prompt_tokens"]) for turn in made]
    begun_at = [int(turn.stats["prompt_tokens"] - turn.stats["prefilled_tokens"]) for turn in made]
    assert begun_at[:-1] == [0, *ends[:-2]]
    assert begun_at[-1] in [0, *ends]  # its figures are of all since the last start
    assert begun_at[-1] > 0
    assert max(end - start for start, end in pairwise([0, *ends])) <= PART


@pytest.mark.slow(minutes=1.5)
def test_kills_at_every_write_of_a_job_lose_nothing(tmp_path: Path) -> None:
    model, home = save_model(tmp_path / "model"), tmp_path / "home"
    daemon, job = begun(home, model, EPISODIC)
    daemon.kill()
    points = ("file.written:3", "index.changed:3", "index.committed:4", "commit.done:3")
    for point in points:
        assert spawn(home, model, *FLAGS, failpoint=point).wait(timeout=60) == -9, point
    daemon = Daemon(home, model, *FLAGS)
    while state(daemon, job)["state"] in ("queued", "running"):
        time.sleep(0.05)
    assert state(daemon, job)["state"] == "done"
    assert daemon.post("/v1/store/verify", {"deep": True})["ok"]
    assert daemon.stop() == 0
    _, _, said = logged(home)
    assert [m["content"] for m in said] == [m["content"] for m in transcript()]
