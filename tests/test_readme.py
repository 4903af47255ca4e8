"""README.md holds what it says: every block of code runs, every table is complete."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import pytest

from agentmem.cli.main import cli
from agentmem.daemon import read_record
from agentmem.home import Home
from agentmem.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP, TOUR, MEASURED, COMPOSED = "Set up", "A tour", "What was measured where", "Composed reuse"
LONG = "Long lives in a small budget"
CLIENTS = "Clients and frameworks"
PORT = "8377"


class Block(NamedTuple):
    """One fenced block and the heading that it stands under."""

    heading: str
    language: str
    code: str


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks() -> list[Block]:
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [Block(h, lang, code) for h, text in sections().items() for lang, code in fence.findall(text)]


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    lines = [line for line in sections()[heading].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


SET_UP_LINES = [block.code.strip() for block in blocks() if block.heading == SET_UP]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A person's shell with the environment activated, an empty home and a free port."""
    plain = {
        name: v for name, v in os.environ.items() if name != "COLUMNS" and not name.startswith("AGENTMEM_")
    }
    models = Path(platformdirs.user_cache_dir("agentmem-tests", False)) / "models"
    return {
        **plain,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{plain['PATH']}",
        "AGENTMEM_MODELS": os.environ.get("AGENTMEM_MODELS", str(models)),
        "AGENTMEM_HOME": str(tmp_path / "home"),
        "AGENTMEM_PORT": str(free_port()),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def tour(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The tour's environment; a daemon that it leaves behind is ended."""
    yield environment
    record = read_record(Home(Path(environment["AGENTMEM_HOME"])))
    if record is not None and record.alive:
        os.kill(record.pid, signal.SIGKILL)


def run(block: Block, environment: dict[str, str], folder: Path) -> str:
    """Run one block as it stands, but for the port; returns what it prints."""
    command = {"sh": ["sh", "-eu"], "python": [sys.executable]}[block.language]
    done = subprocess.run(
        command,
        input=block.code.replace(PORT, environment.get("AGENTMEM_PORT", PORT)),
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_block_is_run_by_a_test() -> None:
    assert {block.heading for block in blocks()} == {SET_UP, TOUR, MEASURED, COMPOSED, LONG, CLIENTS}
    assert {block.language for block in blocks()} == {"sh", "python"}
    assert len(SET_UP_LINES) == 2
    assert TEXT.count("```") == 2 * len(blocks())


@pytest.mark.slow
def test_the_tour_ends_as_it_says(tour: dict[str, str], tmp_path: Path) -> None:
    talk, client, restart = (block for block in blocks() if block.heading == TOUR)

    said = run(talk, tour, tmp_path)
    assert re.search(r"^planner .* hot ", said, re.MULTILINE)
    assert '"object":"chat.completion"' in said
    assert '"agent":"guide"' in said

    remembered = re.findall(
        r"^(\d+) of (\d+) tokens were remembered$", run(client, tour, tmp_path), re.MULTILINE
    )
    (first, _), (second, whole) = remembered
    assert int(first) < int(second) < int(whole)

    shown = run(restart, tour, tmp_path)
    assert "planner is warm" in shown
    assert re.search(r"^turns +3\s*$", shown, re.MULTILINE)
    assert re.search(r"^planner is forgotten", shown, re.MULTILINE)
    assert read_record(Home(Path(tour["AGENTMEM_HOME"]))) is None


@pytest.mark.slow
def test_composed_reuse_is_asked_for_and_explained(tour: dict[str, str], tmp_path: Path) -> None:
    (block,) = (block for block in blocks() if block.heading == COMPOSED)
    said = run(block, tour, tmp_path)
    assert "analyst is made: reuse composed" in said
    assert re.search(r"^reuse +not composed: ", said, re.MULTILINE)
    assert "VERDICT" in said
    assert read_record(Home(Path(tour["AGENTMEM_HOME"]))) is None


@pytest.mark.slow
def test_a_forced_reply_follows_its_schema(tour: dict[str, str], tmp_path: Path) -> None:
    (block,) = (block for block in blocks() if block.heading == CLIENTS)
    run(Block(CLIENTS, "sh", "agentmem up"), tour, tmp_path)
    assert json.loads(run(block, tour, tmp_path))["sky"] in ("clear", "grey")
    run(Block(CLIENTS, "sh", "agentmem down"), tour, tmp_path)


@pytest.mark.slow
def test_a_long_life_is_asked_for_and_looked_at(tour: dict[str, str], tmp_path: Path) -> None:
    (block,) = (block for block in blocks() if block.heading == LONG)
    said = run(block, tour, tmp_path)
    assert "analyst is made: memory episodic, 1 024 tokens of an episode" in said
    assert re.search(r"^analyst, session default: memory episodic", said, re.MULTILINE)
    assert read_record(Home(Path(tour["AGENTMEM_HOME"]))) is None


@pytest.mark.parametrize(
    "block", [b for b in blocks() if b.heading == MEASURED], ids=lambda b: b.code.strip()[:40]
)
def test_how_to_measure_runs(environment: dict[str, str], tmp_path: Path, block: Block) -> None:
    assert run(block, environment, tmp_path)


def test_set_up_lines_stand_alone() -> None:
    """Each makes its own tools, installs from the lock, and ends in what it promises."""
    for line, ending in zip(SET_UP_LINES, (["agentmem", "demo"], ["pytest", "-q"]), strict=True):
        steps = [shlex.split(step) for step in line.split("&&")]
        assert steps[0] == ["python3", "-m", "venv", ".uv"]
        assert steps[1] == [".uv/bin/pip", "install", "-q", "uv"]
        assert steps[2] == [".uv/bin/uv", "run", "--extra", "cpu", *ending]
        assert len(steps) == 3
    assert ".uv/" in (ROOT / ".gitignore").read_text().split()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a repository to clone")
def test_set_up_works_in_a_fresh_clone(environment: dict[str, str], tmp_path: Path) -> None:
    """With an empty home folder; both commands, each with a short end instead of the long one."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True, timeout=60)
    outside = {
        name: value for name, value in environment.items() if not name.startswith(("UV", "VIRTUAL_ENV"))
    }
    outside |= {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for line, end, printed in zip(
        SET_UP_LINES, ("demo --help", "--version"), ("Three agents read", "pytest"), strict=True
    ):
        short = line.removesuffix(" demo").removesuffix(" -q")
        assert printed in run(Block(SET_UP, "sh", f"{short} {end}"), outside, clone)
    assert (clone / ".venv").is_dir()


def test_every_setting_is_in_the_table_with_its_default() -> None:
    told = {cells[0].strip("`"): cells[1].strip("`") for cells in rows("Settings")}
    assert list(told) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        if name not in ("home", "max_context"):
            assert told[name] == written(field.get_default(call_default_factory=True)), name


def written(value: Any) -> str:
    """A default as the table writes it."""
    if hasattr(value, "human_readable"):
        return value.human_readable().replace(".0", "")
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value not in ([], None) else "none"


def test_every_command_is_in_the_table() -> None:
    told = re.findall(r"`(?:agentmem )?([a-z]+)", " ".join(cells[0] for cells in rows("Commands")))
    assert sorted(told) == sorted(cli.commands)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
