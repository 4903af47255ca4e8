"""`bench restore` hands its arguments to the benchmark program and ends with its exit code."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = "from agentmem.cli.main import main; main()"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "bench", "restore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_is_that_of_the_benchmark() -> None:
    result = bench("--help")
    assert result.returncode == 0, result.stderr
    for option in ("--json", "--model", "--shape", "--tokens"):
        assert option in result.stdout


def test_its_exit_code_is_passed_on() -> None:
    assert bench("--no-such-option").returncode == 2
