"""The file that keeps what `verify MODEL` found of a model's KV formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentmem.home import private, publish
from agentmem.model.calibration_file import PARTS
from agentmem.model.identity import digest

UNVERIFIED = "unverified"
MOST = 1 << 20
"""Bytes of a file that is believed."""


class VerdictFile:
    """One model's verdicts in `folder`, by KV format."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        name = digest(["verdict", *(identity[part] for part in PARTS)])
        self.path = folder / f"{name[:32]}.verdict.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """{format: its figures, with "verdict"}; empty where there is no file, or none that can be read."""
        try:
            with open(self.path, "rb", opener=private) as file:
                found = json.loads(file.read(MOST))
        except (OSError, ValueError):
            return {}
        rows = found.get("formats") if isinstance(found, dict) else None
        return {k: v for k, v in rows.items() if isinstance(v, dict)} if isinstance(rows, dict) else {}

    def verdict(self, format: str) -> str:
        """ "ok", "unverified", or why the format is not to be trusted with answers. fp16 needs no verdict."""
        return "ok" if format == "fp16" else str(self.read().get(format, {}).get("verdict", UNVERIFIED))

    def write(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep these verdicts beside those of other formats, whole or not at all. Raises OSError."""
        publish(self.path, json.dumps({"formats": self.read() | dict(rows)}).encode())
