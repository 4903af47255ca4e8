"""Requests made from the OpenAPI schema itself: nothing fails inside, and answers are those that the schema tells of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PATHS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
PROGRAM = shutil.which("schemathesis", path=PATHS)
# What a schema cannot say (a tool that must be chosen must be there) is refused as any bad request is.
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "409", "429", "5xx"]
"""


@pytest.mark.slow(minutes=0.3)
@pytest.mark.skipif(PROGRAM is None, reason="schemathesis makes the requests")
def test_the_daemon_is_as_its_schema_says(start: Any, tmp_path: Path) -> None:
    daemon = start(tmp_path / "home", "--max-reply", "8")
    daemon.chat("ada", "hello")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [
        str(PROGRAM), "run", f"{daemon.url}/openapi.json", "-H", f"Authorization: Bearer {daemon.token}",
        "-n", "15", "--seed", "1", "--phases", "coverage,fuzzing,stateful", "--checks", "all", "--no-color",
        "--exclude-path", "/v1/token/rotate",  # the rest would be tried without a token
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert "401 Unauthorized" not in done.stdout
    assert done.returncode == 0, done.stdout[-4000:]
    assert daemon.http.get("/health").json()["status"] == "ok"
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()
