"""Plug-ins as installed distributions: found, listed, and never able to break the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = "from agentmem.cli.main import main; main()"
GOOD = """
import click
from agentmem.plugins import Adapter, hookimpl

@click.command()
def greet():
    "Say hello."
    click.echo("hello from a plug-in")

@hookimpl
def agentmem_commands(cli):
    cli.add_command(greet)

@hookimpl
def agentmem_adapters():
    return [Adapter("crew", "Names crews.", "crew_memory:Crew")]
"""
BROKEN = {
    "import": ("import no_such_module_anywhere", "no_such_module_anywhere"),
    "exit": ("raise SystemExit(3)", "SystemExit"),
    "hook": (
        "from agentmem.plugins import hookimpl\n@hookimpl\ndef agentmem_commands(cli):\n    raise RuntimeError('no luck')",
        "no luck",
    ),
    "arguments": (
        "from agentmem.plugins import hookimpl\n@hookimpl\ndef agentmem_commands(nonsense):\n    pass",
        "nonsense",
    ),
    "adapters": (
        "from agentmem.plugins import hookimpl\n@hookimpl\ndef agentmem_adapters():\n    return [1]",
        "TypeError",
    ),
    "thief": (
        "import click\nfrom agentmem.plugins import hookimpl\n@hookimpl\ndef agentmem_commands(cli):\n"
        "    cli.add_command(click.Command('forget'))\n    cli.add_command(click.Command('extra'))",
        "replace forget",
    ),
}

Install = Callable[[str, str], None]
Line = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def install(site: Path) -> Install:
    """Put a distribution of one module into a folder, as pip would."""

    def put(name: str, code: str) -> None:
        (site / f"plug_{name}.py").write_text(code)
        facts = site / f"agentmem_{name}-1.2.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: agentmem-{name}\nVersion: 1.2\n")
        (facts / "entry_points.txt").write_text(f"[agentmem]\n{name} = plug_{name}\n")

    return put


@pytest.fixture
def line(site: Path, tmp_path: Path) -> Line:
    """Run `agentmem` as a person does, with the folder on the path."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), "AGENTMEM_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", RUN, *args]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def listed(line: Line) -> dict[str, Any]:
    done = line("plugins", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    return {plugin["name"]: plugin for plugin in document["plugins"]}


def test_a_plug_in_adds_a_command_and_an_adapter(install: Install, line: Line) -> None:
    install("good", GOOD)
    said = line("greet")
    assert (said.returncode, said.stdout) == (0, "hello from a plug-in\n")
    assert "greet" in line("--help").stdout
    assert listed(line) == {
        "good": {
            "name": "good",
            "distribution": "agentmem-good",
            "version": "1.2",
            "commands": ["greet"],
            "adapters": [{"name": "crew", "summary": "Names crews.", "target": "crew_memory:Crew"}],
            "error": None,
        }
    }
    table = line("plugins").stdout
    assert "agentmem-good" in table
    assert "greet" in table


def test_without_plug_ins(line: Line) -> None:
    assert listed(line) == {}
    done = line("plugins")
    assert "no plug-ins" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plug_in_costs_a_warning(install: Install, line: Line, kind: str) -> None:
    code, reason = BROKEN[kind]
    install("broken", code)
    install("good", GOOD)
    said = line("greet")
    assert (said.returncode, said.stdout) == (0, "hello from a plug-in\n")
    assert said.stderr.startswith("agentmem: the plug-in broken is broken: ")
    assert reason in said.stderr
    assert len(said.stderr.splitlines()) == 1
    found = listed(line)
    assert reason in found["broken"]["error"]
    assert found["broken"]["commands"] == []
    assert found["good"]["error"] is None
    assert "extra" not in line("--help").stdout
    assert line("forget", "--help").stdout.count("cannot be undone")
