"""`bench` hands its arguments to the benchmark programs and ends with their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = "from agentmem.cli.main import main; main()"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("restore", ("--json", "--model", "--shape", "--tokens")),
        ("store", ("--json", "--pages", "--turns")),
        ("formats", ("--json", "--model", "--format", "--text")),
        pytest.param("attention", ("--json", "--heads", "--batch", "--tokens"), marks=pytest.mark.slow),
        pytest.param(
            "batch",
            ("--json", "--model", "--shape", "--batch", "--tokens", "--no-load"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_help_is_that_of_the_benchmark(name: str, options: tuple[str, ...]) -> None:
    result = bench(name, "--help")
    assert result.returncode == 0, result.stderr
    for option in options:
        assert option in result.stdout


def test_its_exit_code_is_passed_on() -> None:
    assert bench("restore", "--no-such-option").returncode == 2


@pytest.mark.slow
def test_a_small_store_is_measured_to_the_end() -> None:
    small = (
        "--pages",
        "3000",
        "--agents",
        "20",
        "--turns",
        "20",
        "--steps",
        "20",
        "--megabytes",
        "16",
        "--repeats",
        "1",
    )
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "bench", "store", *small, "--json"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["catalogue"]["pages"] == 1500 + 19 * (1500 // 19)
    assert report["session"]["turns"] == 20
    for check in report["checks"]:
        assert set(check) == {"name", "value", "bound", "unit", "holds"}


@pytest.mark.slow
def test_small_batches_are_measured_to_the_end() -> None:
    small = ("--batch", "1,2", "--tokens", "128", "--steps", "2", "--rounds", "1", "--no-load")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "bench", "batch", *small, "--json"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert [(row["batch"], row["tokens"]) for row in report["rows"]] == [(1, 128), (2, 128)]
    for row in report["rows"]:
        assert {"pages", "fp16_pages", "stock"} <= set(row)
        assert all(row[name]["peak_bytes"] > 0 for name in ("pages", "fp16_pages", "stock"))
    assert [json.loads(line) for line in result.stderr.splitlines()] == report["rows"]
