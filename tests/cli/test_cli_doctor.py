"""doctor finds what is wrong with a home, and is content with a good one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentmem.cli import checkup
from agentmem.cli.exits import Exit
from agentmem.daemon import DaemonRecord
from agentmem.home import Home
from tests.cli.cli_line import invoke, parse


def checks(*args: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in parse(invoke("doctor", "--json", *args))["checks"]}


@pytest.fixture
def made_home(home: Home) -> Home:
    home.root.mkdir(mode=0o700)
    home.token.touch(mode=0o600)
    home.token.write_text("secret-token")
    return home


def test_a_home_and_a_token_of_the_owner_alone_are_ok(made_home: Home) -> None:
    found = checks()
    assert found["home"]["status"] == "ok"
    assert found["token"]["status"] == "ok"
    assert found["daemon"]["status"] == "note"
    assert "secret-token" not in invoke("doctor").output


def test_an_open_home_and_an_open_token_are_warnings(made_home: Home) -> None:
    made_home.root.chmod(0o755)
    made_home.token.chmod(0o644)
    result = invoke("doctor", "--json")
    assert result.exit_code == Exit.WARNINGS
    data = parse(result)
    warned = {check["name"]: check["hint"] for check in data["checks"] if check["status"] == "warning"}
    assert warned["home"].startswith("chmod 700")
    assert warned["token"].startswith("chmod 600")
    assert data["warnings"] == len(warned)


def test_text_names_every_check_and_what_to_do(made_home: Home) -> None:
    made_home.token.chmod(0o644)
    result = invoke("doctor")
    assert result.exit_code == Exit.WARNINGS
    for name in ("home", "token", "disk", "encryption", "daemon", "blas"):
        assert f"{name}: " in result.stdout
    assert "chmod 600" in result.stdout


def test_the_record_of_a_killed_daemon_is_told_from_none(made_home: Home) -> None:
    record = DaemonRecord(2**22 + 1, "http://127.0.0.1:1", 1, "m", "0", str(made_home.root), 0.0)
    record.write(made_home)
    assert "killed" in checks()["daemon"]["message"]


def test_a_missing_blas_says_what_it_costs_and_what_to_install() -> None:
    check = checkup.check_blas({"blas": {"wanted": True, "loaded": None}})
    assert check.status == "warning"
    assert "90 times slower" in check.message
    assert "libopenblas0-pthread" in check.hint


def test_blas_is_no_matter_where_mlx_has_its_own_kernels() -> None:
    assert checkup.check_blas({"blas": {"wanted": False, "loaded": None}}).status == "ok"


def test_little_free_disk_is_a_warning(made_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "FREE_DISK_WANTED", 2**80)
    assert checkup.check_disk(made_home).status == "warning"


SOUND = {
    "backend": "cpu",
    "self_test": {"code_error": 0.9, "paths": {"reference": {"error": 1e-7, "ok": True}}},
    "store": {
        "read_only": False,
        "disk_full": False,
        "problem": None,
        "quarantined": 0,
        "extents": 2,
        "extent_bytes": 4096,
    },
}


@pytest.mark.parametrize(
    ("part", "change", "name", "status", "says"),
    [
        ("store", {"read_only": True, "problem": "fsync: EIO"}, "store", "problem", "fsync: EIO"),
        ("store", {"quarantined": 3}, "store", "warning", "3 damaged"),
        ("store", {"disk_full": True}, "store", "warning", "not kept yet"),
        (
            "self_test",
            {"paths": {"reference": {"error": 1e-7, "ok": True}, "fused": {"error": 0.5, "ok": False}}},
            "kernels",
            "warning",
            "fused (off by 0.5)",
        ),
        (
            "self_test",
            {"paths": {"fused": {"error": 0.5, "ok": False}}},
            "kernels",
            "problem",
            "no attention",
        ),
        ("store", {}, "store", "ok", "2 extents"),
    ],
)
def test_what_is_wrong_in_the_daemon(
    part: str, change: dict[str, Any], name: str, status: str, says: str
) -> None:
    health = {**SOUND, part: {**SOUND[part], **change}}  # type: ignore[dict-item]
    check = {check.name: check for check in checkup.check_health(health)}[name]
    assert check.status == status
    assert says in check.message


def test_with_a_daemon_its_health_is_part_of_it(daemon: Home) -> None:
    result = invoke("doctor", "--json")
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert found["daemon"]["status"] == "ok"
    assert found["kernels"]["status"] == "ok"
    assert found["store"]["status"] == "ok"
    assert result.exit_code in (Exit.OK, Exit.WARNINGS)
