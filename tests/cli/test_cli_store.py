"""`verify` and `repair` on the command line, beside a daemon and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from agentmem.cli.exits import Exit
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse


def test_verify_beside_a_daemon(daemon: Home) -> None:
    invoke("run", "verified", "Say one word.", "--max-tokens", "4")
    report = parse(invoke("verify", "--deep", "--json"))
    assert report["ok"]
    assert report["extents"] >= 1
    assert report["bytes"] > 0
    told = invoke("verify")
    assert told.exit_code == Exit.OK
    assert "everything is as it was written" in told.stdout


def test_repair_beside_a_daemon_puts_damage_aside(daemon: Home) -> None:
    invoke("run", "repaired", "Say something that nobody else was told.", "--max-tokens", "4")
    newest = max((daemon.store / "extents").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    found = invoke("verify", "--deep")
    assert found.exit_code == Exit.INTEGRITY
    assert newest.name[:12] in found.stdout
    mended = parse(invoke("repair", "--json"))
    assert mended["quarantined"] == 1
    assert invoke("verify", "--deep").exit_code == Exit.OK
    assert (daemon.store / "quarantine" / newest.name).exists()
    assert parse(invoke("repair", "--purge", "--json"))["purged_bytes"] >= len(content)


def test_verify_without_a_daemon(home: Home) -> None:
    told = invoke("verify", "--deep")
    assert told.exit_code == Exit.OK, told.stderr
    assert told.stdout.startswith("0 extents")


@pytest.mark.slow
def test_a_damaged_index_without_a_daemon(home: Home) -> None:
    home.prepare()
    (home.store / "extents").mkdir()
    (home.store / "index.sqlite").write_bytes(b"no database at all" * 1000)
    assert invoke("verify", "--json").exit_code == Exit.INTEGRITY
    mended = parse(invoke("repair", "--json"))
    assert mended["rebuilt"]["agents"] == 0
    assert invoke("verify").exit_code == Exit.OK


def test_a_home_that_is_held_is_left_alone(home: Home) -> None:
    home.prepare()
    with FileLock(home.lock):
        refused = invoke("verify")
    assert refused.exit_code == Exit.REFUSED
    assert "held by a daemon" in refused.stderr


@pytest.mark.parametrize("command", ["verify", "repair"])
def test_what_goes_wrong_is_said(home: Home, command: str, tmp_path: Path) -> None:
    home.prepare()
    (home.store / "index.sqlite").write_bytes(b"")
    (home.store / "extents").write_bytes(b"a file where a folder should be")
    result = invoke(command)
    assert result.exit_code == Exit.INTEGRITY
    assert "could not be looked over" in result.stderr


def test_composed_prompts_are_measured(daemon: Home) -> None:
    """Two prompts of one agent teach its template, which is not measured by so few."""
    invoke("create", "measured", "--reuse", "composed")
    invoke("run", "measured", "Tell me of the lighthouse and of its keeper.", "--max-tokens", "2")
    told = invoke("verify", "--composed")
    assert told.exit_code == 0
    row = next(line for line in told.stdout.splitlines() if "measured" in line)
    assert "this template is not calibrated" in row
    assert parse(invoke("verify", "--composed", "--json"))["bounds"]["pairs"] == 20
    assert invoke("verify", "--composed", "--deep").exit_code == 2
    other = parse(invoke("verify", "--composed", "--planner", "lego", "--json"))["templates"]
    assert {row["planner"] for row in other} == {"lego"}
    assert invoke("verify", "--planner", "lego").exit_code == 2
