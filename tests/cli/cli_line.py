"""Run command lines in the tests' own process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from agentmem.cli.main import cli


def invoke(*args: str, stdin: str = "") -> Result:
    """Run one command line on the home that AGENTMEM_HOME names."""
    return CliRunner().invoke(cli, list(args), input=stdin)


def parse(result: Result) -> dict[str, Any]:
    """The one JSON object on stdout."""
    data = json.loads(result.stdout)
    assert data["schema_version"] == 1
    return data
