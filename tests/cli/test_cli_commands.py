"""Every command: help, --json, and the exit code when there is no daemon or the line is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from agentmem.cli.bench import BENCHMARKS
from agentmem.cli.exits import Exit, exit_code
from agentmem.cli.main import cli
from agentmem.daemon import DaemonNotRunning
from agentmem.errors import AlreadyRunning, BadRequest, Forbidden, ModelUnavailable, NotFound, StoreError
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse

PASSES_ARGUMENTS_ON = {f"bench {name}" for name in BENCHMARKS}


def walk(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield prefix + name, command
        if isinstance(command, click.Group):
            yield from walk(command, f"{prefix}{name} ")


COMMANDS = dict(walk(cli))
LEAVES = {name: command for name, command in COMMANDS.items() if not isinstance(command, click.Group)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert command.help.split("\n")[0].endswith(".")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts} has no help"


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - PASSES_ARGUMENTS_ON))
def test_every_command_prints_its_help(name: str) -> None:
    result = invoke(*name.split(), "--help")
    assert result.exit_code == Exit.OK
    assert f"agentmem {name}" in result.stdout.replace("cli ", "agentmem ")


@pytest.mark.parametrize("name", sorted(LEAVES.keys() - PASSES_ARGUMENTS_ON))
def test_every_command_takes_json(name: str) -> None:
    assert any("--json" in parameter.opts for parameter in LEAVES[name].params)


NEED_A_DAEMON = [
    ("agents",),
    ("models",),
    ("show", "planner"),
    ("explain", "planner"),
    ("episodes", "planner"),
    ("memory", "planner", "full"),
    ("create", "planner"),
    ("quota", "planner", "1GB"),
    ("run", "planner", "hello"),
    ("chat", "planner"),
    ("append", "planner", "-"),
    ("jobs",),
    ("warm", "planner"),
    ("evict", "planner"),
    ("fork", "planner", "coder"),
    ("pin", "planner"),
    ("unpin", "planner"),
    ("df",),
    ("prune", "--older", "1d"),
    ("forget", "planner", "--yes"),
]


@pytest.mark.parametrize("line", NEED_A_DAEMON, ids=lambda line: line[0])
def test_without_a_daemon_the_exit_code_is_3_and_says_what_to_do(line: tuple[str, ...], home: Home) -> None:
    result = invoke(*line, stdin="some text\n")
    assert result.exit_code == Exit.NOT_RUNNING
    assert result.stdout == ""
    assert result.stderr.startswith("agentmem: ")
    assert "agentmem up" in result.stderr


@pytest.mark.parametrize("line", NEED_A_DAEMON, ids=lambda line: line[0])
def test_errors_are_json_too(line: tuple[str, ...], home: Home) -> None:
    result = invoke(*line, "--json", stdin="some text\n")
    assert result.exit_code == Exit.NOT_RUNNING
    error = parse(result)["error"]
    assert error["code"] == "daemon_not_running"
    assert error["exit_code"] == Exit.NOT_RUNNING


def test_status_without_a_daemon(home: Home) -> None:
    result = invoke("status", "--json")
    assert result.exit_code == Exit.NOT_RUNNING
    assert parse(result) == {"schema_version": 1, "status": "stopped", "home": str(home.root)}


def test_down_without_a_daemon_is_no_error(home: Home) -> None:
    result = invoke("down", "--json")
    assert result.exit_code == Exit.OK
    assert parse(result)["pid"] is None


def test_no_command_of_the_client_creates_the_home(home: Home) -> None:
    for line in [*NEED_A_DAEMON, ("status",), ("down",), ("doctor",), ("logs",), ("token", "show")]:
        invoke(*line, stdin="text")
    assert not home.root.exists()


@pytest.mark.parametrize(
    "line",
    [
        ("nonsense",),
        ("run", "planner"),
        ("run", "planner", " "),
        ("show", "planner", "--nonsense"),
        ("append", "planner", "/no/such/file"),
        ("up", "--port", "70000"),
        ("memory", "planner"),
        ("memory", "planner", "episodic"),
        ("memory", "planner", "window", "--budget-tokens", "512"),
        ("create", "planner", "--budget-tokens", "512"),
        ("logs", "--json", "--follow"),
    ],
    ids=" ".join,
)
def test_a_wrong_line_is_a_usage_error(line: tuple[str, ...], home: Home) -> None:
    result = invoke(*line)
    assert result.exit_code == Exit.USAGE
    assert "agentmem: " in result.stderr
    assert parse(invoke(*line, "--json"))["error"]["exit_code"] == Exit.USAGE


@pytest.mark.parametrize("line", [("token", "show"), ("logs",)], ids=" ".join)
def test_files_that_the_first_start_makes_are_not_found_before(line: tuple[str, ...], home: Home) -> None:
    result = invoke(*line, "--json")
    assert result.exit_code == Exit.NOT_FOUND
    assert "agentmem up" in parse(result)["error"]["message"]


def test_home_option_names_the_home(home: Home) -> None:
    other = home.root.with_name("other")
    assert parse(invoke("--home", str(other), "status", "--json"))["home"] == str(other)


def test_append_refuses_text_that_is_not_utf8(home: Home, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "latin1.txt"
    path.write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    result = invoke("append", "planner", str(path))
    assert result.exit_code == Exit.USAGE
    assert "not UTF-8" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DaemonNotRunning("x"), 3),
        (BadRequest("x"), 2),
        (NotFound("x"), 4),
        (Forbidden("x"), 5),
        (AlreadyRunning("x"), 5),
        (StoreError("x"), 6),
        (ModelUnavailable("x"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert exit_code(error) == code  # type: ignore[arg-type]


def test_the_command_line_needs_no_mlx() -> None:
    program = "import sys, agentmem.cli.main; print([m for m in sys.modules if m.startswith('mlx')])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
