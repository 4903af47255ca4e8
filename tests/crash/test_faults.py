"""I/O errors under the real store: a failing fsync, a full disk. Turns are answered, and nothing acknowledged is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentmem.cli.checkup import check_health
from tests.crash.daemon import Daemon
from tests.crash.home import fill
from tests.crash.speaker import said
from tests.runtime.agents import cached, extents, memory, open_runtime, turn
from tests.tiny_model import save_model

ROOT = Path(__file__).resolve().parents[2]
TURNS = 6

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace injects the errors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The replies of a home that nothing happens to."""
    runtime = open_runtime(tmp_path_factory.mktemp("undisturbed"))
    replies = [turn(runtime, "ada", said(n)).text for n in range(TURNS + 3)]
    runtime.close()
    return replies


def speak(home: Path, turns: int, *inject: str) -> list[dict[str, Any]]:
    """Turns of a process whose system calls fail as `inject` says; what it told of each."""
    calls = ",".join(sorted({i.partition(":")[0] for i in inject}))
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}"]
    for rule in inject:
        strace += ["-e", f"inject={rule}"]
    command = [
        *(strace if inject else []),
        sys.executable,
        "-m",
        "tests.crash.speaker",
        str(home),
        str(turns),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines[0] == "speaking"
    return [json.loads(line) for line in lines[1:]]


def goes_on(home: Path, told: list[dict[str, Any]], undisturbed: list[str]) -> None:
    """A start without faults knows every acknowledged turn, and goes on with the right words."""
    committed = [t["n"] for t in told if t["committed"]]
    runtime = open_runtime(home, disk_floor=0)
    known = runtime.agents()[0]["turns"] if runtime.agents() else 0
    assert known >= (max(committed) + 1 if committed else 0)
    reply = turn(runtime, "ada", said(known))
    assert reply.text == undisturbed[known]
    assert memory(reply)["committed"]
    if known:
        assert cached(reply) > 0
    assert runtime.upkeep.verify(deep=True)["ok"]
    runtime.close()


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "when"), [("fsync", "1+"), ("fsync", "4"), ("fdatasync", "1+"), ("fdatasync", "5")]
)
def test_a_sync_that_fails_makes_the_store_read_only_and_loses_nothing(
    tmp_path: Path, undisturbed: list[str], call: str, when: str
) -> None:
    speak(tmp_path, 1)
    told = speak(tmp_path, TURNS - 1, f"{call}:error=EIO:when={when}")
    assert [t["text"] for t in told] == undisturbed[1:TURNS]
    states = [t["read_only"] for t in told]
    assert states == sorted(states), "a store that was read-only came back without a restart"
    kept = [t["committed"] for t in told]
    if when == "1+":
        assert not any(kept)
        assert all(states)
    # A file that the background writes may meet the error just after a turn was kept.
    assert all(k or s for k, s in zip(kept, states, strict=True))
    assert not any(k for k, before in zip(kept, [False, *states], strict=False) if before)
    goes_on(tmp_path, told, undisturbed)


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "when"), [("writev", "1"), ("writev", "2..3"), ("pwrite64", "9"), ("pwrite64", "11..13")]
)
def test_a_full_disk_passes_and_loses_nothing(
    tmp_path: Path, undisturbed: list[str], call: str, when: str
) -> None:
    speak(tmp_path, 1)
    told = speak(tmp_path, TURNS - 1, f"{call}:error=ENOSPC:when={when}")
    assert [t["text"] for t in told] == undisturbed[1:TURNS]
    assert not any(t["read_only"] for t in told)
    assert all(t["committed"] or t["disk_full"] for t in told)
    assert told[-1]["committed"]
    goes_on(tmp_path, told, undisturbed)


@pytest.mark.slow
def test_a_disk_that_fills_up_and_gets_room_again(small_disk: Path, undisturbed: list[str]) -> None:
    runtime = open_runtime(small_disk, disk_floor=0)
    replies = [turn(runtime, "ada", said(n)) for n in range(2)]
    ballast = fill(small_disk)
    replies += [turn(runtime, "ada", said(n)) for n in range(2, 4)]
    assert runtime.health()["status"] == "degraded"
    assert runtime.store()["disk"]["disk_full"]
    assert not runtime.store()["disk"]["read_only"]
    assert runtime.agent("ada")["turns"] == 4
    ballast.unlink()
    replies.append(turn(runtime, "ada", said(4)))
    assert [memory(r)["committed"] for r in replies] == [True, True, False, False, True]
    assert runtime.health()["status"] == "ok"
    runtime.close()
    runtime = open_runtime(small_disk, disk_floor=0)
    assert runtime.agent("ada")["turns"] == 5
    replies.append(turn(runtime, "ada", said(5)))
    assert [r.text for r in replies] == undisturbed[:6]
    assert cached(replies[-1]) > 0
    assert runtime.upkeep.verify(deep=True)["ok"]
    runtime.close()


def test_a_daemon_that_ends_on_a_full_disk_keeps_what_was_acknowledged(
    small_disk: Path, undisturbed: list[str]
) -> None:
    runtime = open_runtime(small_disk, disk_floor=0)
    turn(runtime, "ada", said(0))
    ballast = fill(small_disk)
    assert not memory(turn(runtime, "ada", said(1)))["committed"]
    runtime.close()
    ballast.unlink()
    runtime = open_runtime(small_disk, disk_floor=0)
    assert runtime.agent("ada")["turns"] == 1
    assert turn(runtime, "ada", said(1)).text == undisturbed[1]
    assert len(extents(small_disk)) >= 1
    runtime.close()


@pytest.mark.slow
def test_a_client_hears_that_the_disk_is_full(small_disk: Path, tmp_path: Path) -> None:
    daemon = Daemon(small_disk, save_model(tmp_path / "model"), "--disk-floor", "0")
    assert daemon.chat("ada", said(0))["agentmem"]["committed"]
    ballast = fill(small_disk)
    body = {
        "messages": [{"role": "user", "content": said(1)}],
        "max_tokens": 6,
        "agentmem": {"agent": "ada", "history": "server"},
    }
    answered = daemon.http.post("/v1/chat/completions", json=body)
    assert answered.status_code == 200
    assert not answered.json()["usage"]["agentmem"]["committed"]
    assert answered.headers["x-agentmem-store"] == "disk-full"
    health = daemon.get("/health")
    assert health["status"] == "degraded"
    assert {c.name: c.status for c in check_health(health)}["store"] == "warning"
    ballast.unlink()
    assert daemon.http.post("/v1/chat/completions", json=body).json()["usage"]["agentmem"]["committed"]
    again = daemon.http.post("/v1/chat/completions", json=body)
    assert "x-agentmem-store" not in again.headers
    assert daemon.get("/health")["status"] == "ok"
    assert daemon.stop() == 0
