"""Archives that say something else than what was exported, with checksums that are right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.blockpool.archive import Archive, ArchiveWriter, Shape


@dataclass
class Content:
    """Everything in an archive, to be changed at will."""

    manifest: Any
    shape: Shape
    tokens: np.ndarray
    log: np.ndarray
    rows: dict[bool, list[np.ndarray]]


def content(path: Path) -> Content:
    with path.open("rb") as file:
        archive = Archive(file.fileno())
    rows = {raw: [a.copy() for a in archive.rows(raw)] for raw in (False, True)}
    return Content(
        json.loads(archive.manifest), archive.shape, archive.tokens.copy(), archive.log.copy(), rows
    )


def seal(content: Content, path: Path) -> Path:
    """Write an archive of this content, whatever it is."""
    shape = replace(content.shape, log=len(content.log))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        text = content.manifest if isinstance(content.manifest, str) else json.dumps(content.manifest)
        writer = ArchiveWriter(fd, shape, text, content.tokens, content.log)
        for raw, layers in content.rows.items():
            for layer, rows in enumerate(layers):
                writer.put(raw, layer, 0, rows)
        writer.finish()
    finally:
        os.close(fd)
    return path


def changed(path: Path, into: Path, change: Callable[[Content], Any]) -> Path:
    """A copy of an archive with a change."""
    new = content(path)
    change(new)
    return seal(new, into)
