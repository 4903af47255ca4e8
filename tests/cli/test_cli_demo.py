"""The demo: its verdict, and (slow) the whole of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentmem.cli.demo_agents import demo_agents
from agentmem.cli.demo_run import Conversation, Outcome, Turn
from agentmem.cli.exits import Exit
from tests.cli.cli_line import invoke

FIELDS = {
    "name",
    "tokens",
    "cold_ttft_ms",
    "hot_ttft_ms",
    "warm_ttft_ms",
    "speedup_warm",
    "identical",
    "bytes_q4",
    "bytes_fp16",
}


def conversation(*replies: str) -> Conversation:
    turns = [Turn("?", reply, 1000.0 / (10**number), {}) for number, reply in enumerate(replies)]
    info = {"tokens": 1200, "disk_bytes": 30, "fp16_bytes": 100}
    return Conversation(demo_agents()[0], turns, info)


def test_the_agents_are_three_with_texts_and_questions_of_their_own() -> None:
    cast = demo_agents()
    assert len({agent.name for agent in cast}) == 3
    assert len({agent.text for agent in cast}) == 3
    assert len({question for agent in cast for question in agent.questions}) == 9
    for agent in cast:
        assert 800 <= len(agent.text.split()) <= 1000
        assert agent.text in agent.system_message["content"]


def test_the_row_of_an_agent() -> None:
    row = Outcome(conversation("a", "b", "c"), conversation("a", "b", "c")).as_json()
    assert row.keys() >= FIELDS
    assert (row["cold_ttft_ms"], row["hot_ttft_ms"], row["warm_ttft_ms"]) == (1000, 100, 10)
    assert row["speedup_warm"] == 100
    assert row["identical"] is True


@pytest.mark.parametrize("replies", [("x", "b", "c"), ("a", "x", "c"), ("a", "b", "x"), ("a", "b", "c ")])
def test_any_other_reply_is_not_identical(replies: tuple[str, ...]) -> None:
    outcome = Outcome(conversation("a", "b", "c"), conversation(*replies))
    assert not outcome.identical
    assert outcome.as_json()["identical"] is False


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = invoke("demo", "--keep", str(tmp_path))
    assert result.exit_code == Exit.USAGE
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def run_demo(*args: str) -> subprocess.CompletedProcess[str]:
    program = "from agentmem.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "demo", *args],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def daemons_below(folder: Path) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in part for part in process.info["cmdline"] or []) and process.pid != os.getpid()
    ]


@pytest.fixture
def _no_daemon_is_left(tmp_path: Path) -> Iterator[None]:
    """A demo that is cut short cannot end its daemons itself."""
    yield
    for pid in daemons_below(tmp_path):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow(minutes=4)
@pytest.mark.usefixtures("_no_daemon_is_left")
def test_the_whole_demo(tmp_path: Path) -> None:
    result = run_demo("--json", "--keep", str(tmp_path / "kept"))
    assert result.returncode == 0, result.stderr
    data: dict[str, Any] = json.loads(result.stdout)
    assert data["schema_version"] == 1
    assert data["identical"] is True
    assert [agent["name"] for agent in data["agents"]] == [agent.name for agent in demo_agents()]
    for agent in data["agents"]:
        assert agent.keys() >= FIELDS
        assert agent["identical"] is True
        # One turn of 1,024 tokens takes at most 0.37; rows that two more short turns left in 16-bit tails stay as written.
        assert agent["bytes_q4"] <= 0.41 * agent["bytes_fp16"]
        cold, hot, warm = (turn["usage"] for turn in agent["turns"])
        assert cold["prompt_tokens"] >= 1000
        # The first words of the task are the same for all three, and what is the same is shared.
        assert cold["agentmem"]["exact_tokens"] < 64
        for before, after in ((cold, hot), (hot, warm)):
            remembered = before["prompt_tokens"] + before["completion_tokens"]
            # The last sampled token of a reply need not have been run through the model.
            assert after["agentmem"]["exact_tokens"] >= remembered - 1
        assert hot["agentmem"]["state_before"] == "hot"
        assert warm["agentmem"]["state_before"] == "warm"
        assert warm["agentmem"]["restored_tokens"] > 0
    assert "lighthouse" in result.stderr
    assert daemons_below(tmp_path) == []
