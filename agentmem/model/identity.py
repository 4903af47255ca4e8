"""Which model made a cache: hashes of everything that decides what keys and values a token gets."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from agentmem.home import private
from agentmem.model.progress import Progress

ROPE_KEYS = ("rope", "rotary", "max_position_embeddings", "sliding_window", "layer_types")
BLOCK = 1 << 22


def digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def text_identity(identity: dict[str, str]) -> str:
    """What a model's token ids belong to: the hash of its tokenizer and chat template."""
    return digest([identity["tokenizer"], identity["chat_template"]])


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """sha256 of a file's bytes."""
    total = max(1, path.stat().st_size)
    state = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
            done += len(block)
            if progress is not None:
                progress(f"checking {path.name}", done / total)
    return state.hexdigest()


def rope_part(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a model's config that decide how positions enter keys."""
    part = {key: value for key, value in config.items() if any(name in key for name in ROPE_KEYS)}
    nested = config.get("text_config")
    return part | ({"text_config": rope_part(nested)} if isinstance(nested, dict) else {})


class HashCache:
    """sha256 of big files, kept in one JSON file; a file of unchanged size and times is not read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, list[Any]] = {}
        try:
            with open(path, encoding="utf-8", opener=private) as file:
                known = json.load(file)
        except (OSError, ValueError):
            return
        if isinstance(known, dict):
            self._known = known

    def sha256(self, file: Path, progress: Progress | None = None) -> str:
        """The file's hash, from the cache where it is certain to hold."""
        file = file.resolve()
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = self._known.get(str(file))
        if isinstance(entry, list) and len(entry) == 4 and entry[:3] == stamp and isinstance(entry[3], str):
            return entry[3]
        value = file_sha256(file, progress)
        self._known[str(file)] = [*stamp, value]
        self._save()
        return value

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with NamedTemporaryFile("w", encoding="utf-8", dir=self.path.parent, delete=False) as file:
            json.dump(self._known, file, indent=1)
        os.replace(file.name, self.path)
