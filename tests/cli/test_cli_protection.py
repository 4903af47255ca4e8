"""What `doctor` says about who can read the memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agentmem.cli.exits import Exit
from agentmem.cli.protection import check_encryption, check_modes, encrypted_device
from agentmem.daemon import DaemonRecord, find_endpoint, read_record
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    for folder in (home.root, home.store, home.keys, home.log.parent):
        folder.mkdir(mode=0o700, parents=True)
    return home


def facts(**changes: Any) -> dict[str, Any]:
    return {"new_agents": "off", "off": 0, "file": 0, "keyring": 0, "locked": 0, **changes}


def test_files_that_others_may_read_are_named(home: Home) -> None:
    assert check_modes(home).status == "ok"
    loose = home.keys / "f0"
    loose.touch(mode=0o600)
    assert check_modes(home).status == "ok"
    loose.chmod(0o640)
    found = check_modes(home)
    assert found.status == "warning"
    assert str(loose) in found.message
    assert "chmod" in found.hint


@pytest.mark.parametrize(
    ("found", "status", "said"),
    [
        (facts(off=3), "note", "0 agents are encrypted (AES-256-GCM), 3 are kept in plain text"),
        (facts(new_agents="keyring", keyring=2), "ok", "2 agents are encrypted"),
        (facts(new_agents="file", file=1, off=1), "note", "whoever copies the whole home has them"),
        (facts(new_agents="file", file=2, locked=1), "warning", "their keys are not there"),
    ],
)
def test_what_is_encrypted(home: Home, found: dict[str, Any], status: str, said: str) -> None:
    check = check_encryption(home, found)
    assert check.status == status
    assert said in check.message


def test_without_a_daemon_there_are_only_the_keys(home: Home) -> None:
    (home.keys / "f0").touch()
    check = check_encryption(home, None)
    assert check.status == "note"
    assert "1 keys" in check.message


def device(sysfs: Path, number: str, uuid: str | None, slave: Path | None = None) -> Path:
    folder = sysfs / number
    (folder / "slaves").mkdir(parents=True)
    if uuid is not None:
        (folder / "dm").mkdir()
        (folder / "dm" / "uuid").write_text(uuid)
    if slave is not None:
        (folder / "slaves" / "below").symlink_to(slave)
    return folder


def test_encrypted_devices_are_found_below_others(tmp_path: Path) -> None:
    luks = device(tmp_path, "253:0", "CRYPT-LUKS2-0123")
    device(tmp_path, "253:1", "LVM-abc", slave=luks)
    device(tmp_path, "8:1", None)
    assert encrypted_device(os.makedev(253, 0), tmp_path) is True
    assert encrypted_device(os.makedev(253, 1), tmp_path) is True
    assert encrypted_device(os.makedev(8, 1), tmp_path) is False
    assert encrypted_device(os.makedev(0, 42), tmp_path) is None


def test_doctor_tells_what_is_known(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_HOME", str(home.root))
    found = {check["name"]: check for check in parse(invoke("doctor", "--json"))["checks"]}
    assert found["modes"]["status"] == "ok"
    assert found["encryption"]["status"] == "note"
    assert found["disk encryption"]["message"]


def test_files_of_the_home_are_not_followed_elsewhere(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_HOME", str(home.root))
    elsewhere = home.root.parent / "elsewhere"
    elsewhere.write_text("x" * 40)
    for path in (home.token, home.log, home.daemon):
        path.symlink_to(elsewhere)
    assert invoke("token", "show").exit_code == Exit.REFUSED
    assert invoke("logs").exit_code == Exit.REFUSED
    up = invoke("up")
    assert up.exit_code == Exit.REFUSED
    assert str(home.log) in up.stderr
    assert read_record(home) is None
    assert find_endpoint("http://127.0.0.1:1", None, home.root).token is None
    DaemonRecord(1, "http://127.0.0.1:1", 1, "m", "0", str(home.root), 0.0).write(home)
    assert not home.daemon.is_symlink()
    assert elsewhere.read_text() == "x" * 40
