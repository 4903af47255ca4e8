"""Start, second start, kill, stop."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

import agentmem
from agentmem.daemon import read_record, running_daemon
from agentmem.errors import Forbidden
from agentmem.home import Home
from agentmem.server.__main__ import main
from agentmem.server.life import bind
from agentmem.settings import Settings

STORY = "The carpenter keeps every plan she ever drew in a chest under the window of the workshop. " * 2


def test_record_says_who_serves(daemon, record) -> None:
    assert record["pid"] == daemon.process.pid
    assert record["url"] == daemon.url == f"http://127.0.0.1:{record['port']}"
    assert record["version"] == agentmem.__version__
    assert record["home"] == str(daemon.home)
    assert running_daemon(Home(daemon.home)) is not None


def test_second_daemon_on_a_home_says_who_holds_it(daemon, launch) -> None:
    second = launch(daemon.home)
    output, problem = second.communicate(timeout=120)
    assert second.returncode == 5
    assert output == ""
    assert f"pid {daemon.process.pid}" in problem
    assert daemon.url in problem
    assert read_record(Home(daemon.home)) is not None
    assert daemon.http.get("/health").status_code == 200


@pytest.mark.slow
def test_killed_daemon_starts_again_and_remembers(start, tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = start(home)
    asked = first.chat("carpenter", STORY, max_tokens=12)
    reply = asked["choices"][0]["message"]["content"]
    first.stop(signal.SIGKILL)
    left = read_record(Home(home))
    assert left is not None
    assert not left.alive

    second = start(home)
    assert second.token == first.token
    assert (running_daemon(Home(home)) or left).pid == second.process.pid
    usage = second.chat("carpenter", STORY, reply, "Where is the chest?")["usage"]
    assert usage["agentmem"]["state_before"] == "warm"
    assert usage["prompt_tokens_details"]["cached_tokens"] >= asked["usage"]["prompt_tokens"]

    assert second.stop(signal.SIGTERM) == 0
    assert not (home / "daemon.json").exists()


@pytest.mark.slow
def test_interrupt_while_the_model_loads_stops_cleanly(launch, tmp_path: Path) -> None:
    home = tmp_path / "home"
    process = launch(home, log=tmp_path / "log")
    while not (home / "token").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 0
    assert not (home / "daemon.json").exists()


def test_address_that_others_can_reach_is_refused(launch, tmp_path: Path) -> None:
    process = launch(tmp_path / "home", "--host", "0.0.0.0")
    _, problem = process.communicate(timeout=120)
    assert process.returncode == 5
    assert "loopback" in problem


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_no_socket_is_bound_to_such_an_address(tmp_path: Path, host: str) -> None:
    with pytest.raises(Forbidden, match="loopback"):
        bind(Settings(home=tmp_path, host=host, port=0))


def test_port_that_is_taken(launch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = launch(tmp_path / "home", "--port", str(other.getsockname()[1]))
        _, problem = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "--port" in problem


@pytest.mark.parametrize("flags", [("--no-such-flag",), ("--port", "99999"), ("--ram-budget", "much")])
def test_bad_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    try:
        status: object = main(["--home", str(tmp_path / "home"), *flags])
    except SystemExit as left:
        status = left.code
    assert status == 2
    problem = capsys.readouterr().err
    assert flags[0].strip("-").replace("-", "_") in problem.replace("-", "_")
