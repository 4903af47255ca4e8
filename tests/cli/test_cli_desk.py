"""Commands around the daemon: documents, the live picture, settings, the service manager's file, completion."""

from __future__ import annotations

import os
import plistlib
import stat
import subprocess
from pathlib import Path

import pytest

import agentmem.cli.service
from agentmem.cli.exits import Exit
from agentmem.home import Home
from agentmem.settings import Settings
from tests.cli.cli_line import invoke, parse


def test_a_document_is_added_shown_and_removed(daemon: Home, tmp_path: Path) -> None:
    file = tmp_path / "harbour.md"
    file.write_text("The harbour light burns from dusk to dawn.")
    (added,) = parse(invoke("doc", "add", str(file), "--json"))["documents"]
    assert added["name"] == "harbour.md"
    assert f"harbour.md  {added['tokens']}" in " ".join(invoke("doc", "ls").stdout.split("\n")).replace(
        "      ", "  "
    )
    assert invoke("doc", "show", "harbour.md").stdout == file.read_text() + "\n"
    assert invoke("doc", "rm", "harbour.md").exit_code == Exit.OK
    assert invoke("doc", "show", "harbour.md").exit_code == Exit.NOT_FOUND
    assert invoke("doc", "add", str(file), str(file), "--as", "x").exit_code == Exit.USAGE
    file.write_bytes(b"\xff\xfe")
    assert invoke("doc", "add", str(file)).exit_code == Exit.USAGE


def test_top_shows_agents_and_what_the_daemon_does(daemon: Home) -> None:
    assert invoke("run", "watched", "hello", "--max-tokens", "2").exit_code == Exit.OK
    shown = invoke("top", "--once", "--sort", "ram").stdout
    assert "watched" in shown
    assert "0 running, 0 waiting" in shown
    found = parse(invoke("top", "--json"))
    assert "watched" in [agent["agent"] for agent in found["agents"]]
    assert found["health"]["status"] == "ok"


def test_config_says_where_each_setting_comes_from(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.prepare()
    home.config.write_text('max_batch = 3\nram_budget = "64MiB"\n')
    monkeypatch.setenv("AGENTMEM_MAX_REPLY", "77")
    found = parse(invoke("config", "show", "--json"))["settings"]
    assert found["max_batch"] == {"value": 3, "origin": "config.toml"}
    assert found["max_reply"] == {"value": 77, "origin": "environment"}
    assert found["host"] == {"value": "127.0.0.1", "origin": "default"}
    assert invoke("config", "path").stdout.strip() == str(home.config)
    home.config.write_text("max_batch = 0\n")
    broken = invoke("config", "show")
    assert broken.exit_code == Exit.USAGE
    assert "max_batch" in broken.stderr


def test_config_sets_what_the_next_start_uses_and_keeps_comments(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.prepare()
    home.config.write_text("# ours\nmax_batch = 3\n")
    assert invoke("config", "set", "max_batch", "8").exit_code == Exit.OK
    assert invoke("config", "set", "ram_budget", "64MiB").exit_code == Exit.OK
    assert invoke("config", "set", "allowed_hosts", '["box.lan"]').exit_code == Exit.OK
    assert invoke("config", "set", "model", "4").exit_code == Exit.OK
    said = parse(invoke("config", "set", "open_inference", "true", "--json"))
    assert (said["setting"], said["value"], said["origin"]) == ("open_inference", True, "config.toml")
    settings = Settings()
    assert (settings.max_batch, settings.ram_budget, settings.allowed_hosts) == (8, 64 << 20, ["box.lan"])
    assert (settings.model, settings.open_inference) == ("4", True)
    assert home.config.read_text().startswith("# ours\nmax_batch = 8\n")
    assert invoke("config", "unset", "max_batch").exit_code == Exit.OK
    assert invoke("config", "unset", "max_batch").exit_code == Exit.OK
    assert Settings().max_batch == Settings.model_fields["max_batch"].default
    monkeypatch.setenv("AGENTMEM_MAX_BATCH", "5")
    assert "max_batch is 5 (environment)" in invoke("config", "set", "max_batch", "2").stdout


def test_config_refuses_what_the_daemon_could_not_use_and_leaves_the_file(home: Home) -> None:
    home.prepare()
    home.config.write_text("max_batch = 3\n")
    for name, value, said in (
        ("max_batch", "0", "greater than or equal to 1"),
        ("max_batch", "many", "integer"),
        ("max_bach", "4", "did you mean max_batch?"),
        ("home", "/tmp", "AGENTMEM_HOME"),
        ("memory_limit", "200%", "share"),
    ):
        refused = invoke("config", "set", name, value)
        assert refused.exit_code == Exit.USAGE
        assert said in refused.stderr
    assert home.config.read_text() == "max_batch = 3\n"
    home.config.write_text("max_batch = = 3\n")
    assert "not TOML" in invoke("config", "set", "max_batch", "4").stderr
    assert home.config.read_text() == "max_batch = = 3\n"


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A service manager that writes down what it is told."""
    log, program = tmp_path / "told", tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return log


def test_the_service_is_installed_started_and_removed(home: Home, systemctl: Path, tmp_path: Path) -> None:
    unit = tmp_path / "config" / "systemd" / "user" / "agentmem.service"
    assert parse(invoke("service", "status", "--json"))["state"] == "not installed"
    assert invoke("service", "uninstall").exit_code == Exit.NOT_FOUND
    assert parse(invoke("service", "install", "--json")) == {
        "schema_version": 1,
        "path": str(unit),
        "state": "started",
    }
    assert str(home.root) in unit.read_text()
    assert unit.read_text() == invoke("service", "print").stdout
    assert stat.S_IMODE(unit.stat().st_mode) == 0o600
    assert parse(invoke("service", "status", "--json"))["state"] == "running"
    assert parse(invoke("service", "uninstall", "--json"))["state"] == "removed"
    assert not unit.exists()
    told = systemctl.read_text().splitlines()
    assert "--user enable --now agentmem.service" in told
    assert told[-1] == "--user disable --now agentmem.service"


def test_a_mac_gets_a_property_list(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(agentmem.cli.service.sys, "platform", "darwin")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = plistlib.loads(invoke("service", "print").stdout.encode())
    assert found["ProgramArguments"][-2:] == ["--home", str(home.root)]
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert found["Umask"] == 0o077
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = invoke("service", "install")
    assert missing.exit_code == Exit.NOT_FOUND
    assert "launchctl is not here" in missing.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_the_shell(shell: str) -> None:
    script = invoke("completion", shell).stdout
    assert "_AGENTMEM_COMPLETE" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
