"""`agentmem launch`: tools that say what they were given, a real daemon, and nothing of the person's own touched."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentmem.cli.exits import Exit
from agentmem.daemon import read_record, running_daemon
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse

RUN = "from agentmem.cli.main import main; main()"
TOOL = '#!/bin/sh\necho "arguments: $*"\nenv\n'
TOOLS = ("claude", "codex", "opencode")
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def person(tmp_path: Path) -> Path:
    """Somebody's home folder, with configurations of their own."""
    folder = tmp_path / "person"
    for name in (".claude/settings.json", ".codex/config.toml", ".config/opencode/opencode.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
    return folder


@pytest.fixture
def launch(tmp_path: Path, person: Path) -> Launch:
    """Run `agentmem launch` on a home, with tools on the path that print their environment."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)

    def run(home: Home, *args: str, path: str = f"{tools}:/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "HOME": str(person),
            "PATH": path,
            "AGENTMEM_HOME": str(home.root),
            "ANTHROPIC_API_KEY": "sk-mine",
            "NO_PROXY": "intranet.example",
        }
        command = [sys.executable, "-c", RUN, "launch", *args]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


def given(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def inference_token(home: Home) -> str:
    return home.inference_token.read_text().strip()


def works(base: str, token: str) -> bool:
    """Whether this address and token lead to inference, and to nothing else."""
    headers = {"authorization": f"Bearer {token}"}
    models = httpx.get(f"{base}/v1/models", headers=headers, trust_env=False)
    agents = httpx.get(f"{base}/v1/agents", headers=headers, trust_env=False)
    return (models.status_code, agents.status_code) == (200, 403)


def facts_of(home: Home) -> Any:
    record = read_record(home)
    assert record is not None
    return record


def test_claude(daemon: Home, launch: Launch) -> None:
    done = launch(daemon, "claude", "--", "-p", "say hi", "--json")
    told, record = given(done), facts_of(daemon)
    assert "arguments: -p say hi --json" in done.stdout
    assert told["ANTHROPIC_BASE_URL"] == record.url
    assert told["ANTHROPIC_MODEL"] == told["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == record.model
    assert told["CLAUDE_CONFIG_DIR"] == str(daemon.root / "launch" / "claude")
    assert "ANTHROPIC_API_KEY" not in told
    assert works(told["ANTHROPIC_BASE_URL"], told["ANTHROPIC_AUTH_TOKEN"])


def test_codex(daemon: Home, launch: Launch) -> None:
    told, record = given(launch(daemon, "codex")), facts_of(daemon)
    config = tomllib.loads((Path(told["CODEX_HOME"]) / "config.toml").read_text())
    provider = config["model_providers"][config["model_provider"]]
    assert config["model"] == record.model
    assert provider["wire_api"] == "responses"
    assert works(provider["base_url"].removesuffix("/v1"), told[provider["env_key"]])


def test_opencode(daemon: Home, launch: Launch) -> None:
    told, record = given(launch(daemon, "opencode")), facts_of(daemon)
    config = json.loads(Path(told["OPENCODE_CONFIG"]).read_text())
    name, _, model = config["model"].partition("/")
    provider = config["provider"][name]
    assert provider["npm"] == "@ai-sdk/openai-compatible"
    assert list(provider["models"]) == [model] == [record.model]
    variable = provider["options"]["apiKey"].removeprefix("{env:").removesuffix("}")
    assert works(provider["options"]["baseURL"].removesuffix("/v1"), told[variable])


@pytest.mark.parametrize("tool", TOOLS)
def test_profiles_are_private_and_hold_no_token(
    daemon: Home, launch: Launch, person: Path, tool: str
) -> None:
    told = given(launch(daemon, tool))
    folder = daemon.root / "launch" / tool
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert inference_token(daemon) not in path.read_text()
    assert daemon.token.read_text().strip() not in told.values()
    assert told["NO_PROXY"].split(",") == ["intranet.example", "127.0.0.1", "localhost", "::1"]
    own = [path for path in person.rglob("*") if path.is_file()]
    assert len(own) == 3
    assert {path.read_text() for path in own} == {"mine"}


@pytest.mark.parametrize("tool", TOOLS)
def test_print_shows_and_changes_nothing(home: Home, tool: str, launch: Launch) -> None:
    shown = invoke("launch", tool, "--print", "--", "a b")
    assert shown.exit_code == Exit.OK, shown.stderr
    assert shown.stdout.splitlines()[-1] == f"{tool} 'a b'"
    assert '="$(agentmem token show --inference)"' in shown.stdout
    document = parse(invoke("launch", tool, "--json", "--", "a b"))
    assert document["command"] == [tool, "a b"]
    assert "8377" in json.dumps(document)
    assert not home.root.exists()


def test_what_is_printed_is_a_shell_script(daemon: Home, launch: Launch) -> None:
    shown = invoke("launch", "claude", "--print").stdout
    assert inference_token(daemon) not in shown
    assert facts_of(daemon).url in shown
    subprocess.run(["sh", "-n"], input=shown, text=True, check=True, timeout=10)


def test_a_tool_that_is_not_there(home: Home, launch: Launch) -> None:
    done = launch(home, "codex", path="/usr/bin:/bin")
    assert done.returncode == Exit.NOT_FOUND
    assert "codex is not installed" in done.stderr
    assert not home.root.exists()


def test_a_folder_that_is_a_link_is_refused(daemon: Home, launch: Launch, tmp_path: Path) -> None:
    (daemon.root / "launch").mkdir(mode=0o700, exist_ok=True)
    folder = daemon.root / "launch" / "codex"
    kept = folder.with_name("codex.kept")
    if folder.exists():
        folder.rename(kept)
    folder.symlink_to(tmp_path)
    try:
        done = launch(daemon, "codex")
    finally:
        folder.unlink()
    assert done.returncode == Exit.REFUSED
    assert not (tmp_path / "config.toml").exists()


@pytest.mark.slow
def test_the_daemon_is_started_if_need_be(
    home: Home, launch: Launch, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMEM_MODEL", str(tiny_model))
    monkeypatch.setenv("AGENTMEM_PORT", "0")
    told = given(launch(home, "claude"))
    record = running_daemon(home)
    assert record is not None
    assert told["ANTHROPIC_BASE_URL"] == record.url
    assert works(told["ANTHROPIC_BASE_URL"], told["ANTHROPIC_AUTH_TOKEN"])
