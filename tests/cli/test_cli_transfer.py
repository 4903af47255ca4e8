"""Agents as files on the command line, against a real daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem.cli.exits import Exit
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse

STORY = "The gardener writes the name of each seed on a small stone and lays it on the wall. " * 4


@pytest.fixture(autouse=True)
def _with_a_daemon(daemon: Home) -> None:
    """Every test here needs one."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An exported agent."""
    assert invoke("append", "packer", "-", stdin=STORY).exit_code == Exit.OK
    path = tmp_path / "packer.safetensors"
    done = invoke("export", "packer", str(path))
    assert done.exit_code == Exit.OK, done.stderr
    assert str(path) in done.stdout
    invoke("forget", "packer", "--yes")
    return path


def test_there_and_back(file: Path) -> None:
    back = invoke("import", str(file))
    assert back.exit_code == Exit.OK, back.stderr
    assert "continues where it was" in back.stdout
    usage = parse(invoke("run", "packer", "Go on.", "--max-tokens", "2", "--json"))["usage"]
    assert usage["agentmem"]["state_before"] == "warm"
    assert usage["agentmem"]["exact_tokens"] > 300


def test_json_and_names(file: Path, tmp_path: Path) -> None:
    result = parse(invoke("import", str(file), "--as", "unpacked", "--trust", "--json"))
    assert result["agent"]["agent"] == "unpacked"
    assert (result["kept"], result["trusted"]) == ("state", True)
    again = parse(invoke("export", "unpacked", str(tmp_path / "again"), "--json"))
    assert again["bytes"] == (tmp_path / "again").stat().st_size


def test_nothing_is_replaced_unasked(file: Path) -> None:
    invoke("import", str(file), "--as", "kept")
    over = invoke("export", "kept", str(file))
    assert over.exit_code == Exit.REFUSED
    assert "exists" in over.stderr
    over = invoke("import", str(file), "--as", "kept")
    assert over.exit_code == Exit.REFUSED
    assert "kept" in over.stderr
    assert invoke("import", str(file), "--as", "kept", "--force").exit_code == Exit.OK
    assert invoke("export", "kept", str(file), "--force").exit_code == Exit.OK


def test_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"no archive at all")
    assert invoke("import", str(tmp_path / "bad")).exit_code == Exit.INTEGRITY
    assert invoke("import", str(tmp_path / "absent")).exit_code == Exit.NOT_FOUND
    assert invoke("export", "nobody", str(tmp_path / "out")).exit_code == Exit.NOT_FOUND
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]
