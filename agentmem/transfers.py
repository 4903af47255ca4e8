"""Files of exported agents on the client's side: downloads that are whole or not there, uploads piece by piece."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from agentmem.errors import AlreadyExists, NotFound
from agentmem.wire import Call, agent_call

Progress = Callable[[int, int | None], None]

PIECE = 1 << 20


def export_call(agent: str, namespace: str) -> Call:
    return agent_call("POST", agent, namespace, "export")


def import_query(namespace: str, name: str | None, trust: bool, force: bool) -> dict[str, str]:
    query = {"namespace": namespace, "trust": str(trust).lower(), "force": str(force).lower()}
    return query if name is None else {**query, "agent": name}


class Download:
    """A file that appears under its name when it is complete; 0600. Raises AlreadyExists unless `force` may replace one."""

    def __init__(self, path: str | Path, force: bool, progress: Progress | None) -> None:
        self._path, self._force = Path(path), force
        self._progress = progress
        self.bytes = 0
        if not force:
            self._refuse_old()
        fd, self._temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".", suffix=".part")
        self._file = os.fdopen(fd, "wb")

    def _refuse_old(self) -> None:
        if self._path.exists() or self._path.is_symlink():
            raise AlreadyExists(f"{self._path} exists; name another file, or replace it with force")

    def write(self, piece: bytes, response: httpx.Response) -> None:
        """Add a piece of the answer's body."""
        self._file.write(piece)
        self.bytes += len(piece)
        if self._progress is not None:
            length = response.headers.get("content-length", "")
            self._progress(self.bytes, int(length) if length.isdecimal() else None)

    def finish(self) -> dict[str, Any]:
        """Give the file its name. Returns `{"path", "bytes"}`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if not self._force:
            self._refuse_old()
        os.replace(self._temporary, self._path)
        return {"path": str(self._path), "bytes": self.bytes}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is not None:
            Path(self._temporary).unlink(missing_ok=True)


class Upload:
    """The pieces of a file and the headers that go with them. Raises NotFound when there is no such file."""

    def __init__(self, path: str | Path, progress: Progress | None) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise NotFound(f"there is no file {path}")
        self._size = self._path.stat().st_size
        self._progress = progress
        self.headers = {"content-type": "application/octet-stream", "content-length": str(self._size)}

    def pieces(self) -> Iterator[bytes]:
        sent = 0
        with self._path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece
                sent += len(piece)
                if self._progress is not None:
                    self._progress(sent, self._size)
