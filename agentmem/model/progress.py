"""How long work on a model (a download, a conversion) reports back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Progress = Callable[[str, float | None], None]
"""Called with the name of the stage and how much of it is done (0 to 1, None where that is not known)."""


def silent(stage: str, fraction: float | None) -> None:
    """The Progress of a caller that does not want to know."""


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder that others are writing to."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # a temporary file may go while it is looked at
            continue
    return total
