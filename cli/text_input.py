"""Text that a person hands over in a file or a pipe."""

from __future__ import annotations

from typing import TextIO

import click


def read_text(file: TextIO) -> str:
    """All of `file`. Raises UsageError when that is not UTF-8, or nothing."""
    try:
        text = file.read()
    except UnicodeDecodeError as cause:
        raise click.UsageError(f"{file.name} is not UTF-8 text: {cause}") from cause
    if not text.strip():
        raise click.UsageError(f"{file.name} is empty")
    return text
