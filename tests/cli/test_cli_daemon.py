"""The daemon's life: up, status, down, crashes, refusals, and what it prints while it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from agentmem.cli import daemon as life
from agentmem.cli.exits import Exit
from agentmem.daemon import running_daemon
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("agentmem ready http://127.0.0.1:8377", life.Ready("http://127.0.0.1:8377")),
        ("agentmem progress 0.25 converting the model\n", life.Progress(0.25, "converting the model")),
        ("agentmem progress", None),
        ("2026-01-01 INFO agentmem: ready", None),
        ("", None),
    ],
)
def test_lines_of_the_daemon(line: str, event: life.Ready | life.Progress | None) -> None:
    assert life.read_line(line) == event


def test_settings_become_flags() -> None:
    command = life.server_command(
        {"port": 0, "kv_format": None, "open_inference": True, "allow_remote": None}
    )
    assert command == [sys.executable, "-m", "agentmem.server", "--port", "0", "--open-inference"]


def test_an_address_that_others_can_reach_is_refused(home: Home) -> None:
    result = invoke("up", "--port", "0", "--host", "0.0.0.0", "--json")
    assert result.exit_code == Exit.REFUSED
    assert "loopback" in parse(result)["error"]["message"]
    assert running_daemon(home) is None


def test_a_wrong_setting_is_a_usage_error(home: Home) -> None:
    result = invoke("up", "--port", "0", "--ram-budget", "plenty")
    assert result.exit_code == Exit.USAGE
    assert "ram_budget" in result.stderr


@pytest.mark.slow
def test_a_model_that_is_not_there_is_a_failure_that_says_so(home: Home) -> None:
    result = invoke("up", "--port", "0", "--model", "/no/such/model")
    assert result.exit_code == Exit.FAILURE
    assert "/no/such/model" in result.stderr
    assert running_daemon(home) is None


def test_a_port_that_is_taken_is_a_failure_that_says_so(daemon: Home, tmp_path: Path) -> None:
    taken = str(parse(invoke("status", "--json"))["port"])
    result = invoke("--home", str(tmp_path / "other"), "up", "--port", taken)
    assert result.exit_code == Exit.FAILURE
    assert taken in result.stderr


def test_up_is_idempotent(daemon: Home) -> None:
    record = running_daemon(daemon)
    assert record is not None
    again = parse(invoke("up", "--json"))
    assert again["status"] == "running"
    assert (again["pid"], again["url"], again["home"]) == (record.pid, record.url, str(daemon.root))
    assert {"model", "version"} <= again.keys()
    other = invoke("up", "--model", "another")
    assert other.exit_code == Exit.OK
    assert "do not apply" in other.stderr


def test_a_second_daemon_on_the_same_home_is_refused(daemon: Home) -> None:
    with pytest.raises(life.AlreadyRunning, match="held by"):
        life.start_daemon(daemon, {"port": 0})
    assert parse(invoke("status", "--json"))["status"] == "running"


def test_status_says_where_and_how(daemon: Home) -> None:
    data = parse(invoke("status", "--json"))
    assert data["status"] == "running"
    assert data["health"]["status"] == "ok"
    assert data["uptime_s"] >= 0
    assert data["url"] in invoke("status").stdout


def test_token_and_logs(daemon: Home) -> None:
    token = daemon.token.read_text().strip()
    assert invoke("token", "show").stdout == token + "\n"
    assert parse(invoke("token", "show", "--json"))["token"] == token
    lines = parse(invoke("logs", "--json", "--lines", "1000"))["lines"]
    assert any(line.startswith("agentmem ready ") for line in lines)
    assert invoke("logs", "--lines", "1").stdout.splitlines() == lines[-1:]
    assert token not in "\n".join(lines)


@pytest.mark.slow
def test_a_killed_daemon_is_noticed_and_started_again(home: Home, tiny_model: Path) -> None:
    line = ("up", "--port", "0", "--model", str(tiny_model), "--json")
    first = parse(invoke(*line))
    assert first["status"] == "started"
    os.kill(first["pid"], signal.SIGKILL)
    psutil.Process(first["pid"]).wait(10)

    assert invoke("status").exit_code == Exit.NOT_RUNNING
    assert invoke("agents").exit_code == Exit.NOT_RUNNING
    checks = {check["name"]: check for check in parse(invoke("doctor", "--json"))["checks"]}
    assert "killed" in checks["daemon"]["message"]

    second = parse(invoke(*line))
    assert second["status"] == "started"
    assert second["pid"] != first["pid"]
    stopped = parse(invoke("down", "--json"))
    assert stopped["pid"] == second["pid"]
    ended = psutil.Process(second["pid"])
    assert ended.status() == psutil.STATUS_ZOMBIE, "it is collected by who started it: this process, here"
    ended.wait(1)
    assert invoke("status").exit_code == Exit.NOT_RUNNING


@pytest.mark.slow
def test_serve_reports_as_json_and_ends_on_sigterm(home: Home, tiny_model: Path) -> None:
    command = [sys.executable, "-c", "from agentmem.cli.main import main; main()", "serve", "--json"]
    command += ["--port", "0", "--model", str(tiny_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        events = []
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1].get("event") == "ready":
                process.terminate()
        assert process.wait(30) == 0
    ready = [event for event in events if event["event"] == "ready"]
    assert len(ready) == 1
    assert ready[0]["schema_version"] == 1
    assert ready[0]["url"].startswith("http://127.0.0.1:")
    assert not psutil.pid_exists(ready[0]["pid"])
