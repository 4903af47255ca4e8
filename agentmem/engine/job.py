"""A job: a transcript that an agent reads in the background, and the folder where jobs wait for a daemon."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from agentmem.blockpool.files import TEMPORARY, Files
from agentmem.engine.request import ChatRequest, Ticket

log = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "cancelled"]


class JobInfo(TypedDict):
    """A job as it is reported. Times are epoch seconds; `tokens_total` is None until the transcript was looked at.

    `tokens_read` of them are in the session, or on the way there; `messages` is how many messages there are.
    """

    id: str
    agent: str
    session: str
    namespace: str
    state: State
    tokens_total: int | None
    tokens_read: int
    messages: int
    error: str | None
    created: float
    updated: float


@dataclass(eq=False, slots=True)
class Job:
    """One transcript for one session. `said` are its messages as the engine takes them, until it has ended.

    `stop` ends it soon. `ticket` is the hold on its request, while there is one.
    """

    agent: str
    session: str
    namespace: str
    said: list[dict[str, Any]]
    messages: int
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(8)}")
    state: State = "queued"
    tokens_total: int | None = None
    tokens_read: int = 0
    error: str | None = None
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    stop: bool = False
    ticket: Ticket | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def request(self) -> ChatRequest:
        """All of its messages behind those of the session; what of that is there already is reused."""
        return ChatRequest(
            self.agent, self.said, self.session, self.namespace, "server", generate=False, reuse="exact", job=self.id,
        )  # fmt: skip

    def info(self) -> JobInfo:
        return JobInfo(
            id=self.id, agent=self.agent, session=self.session, namespace=self.namespace, state=self.state,
            tokens_total=self.tokens_total, tokens_read=self.tokens_read, messages=self.messages, error=self.error,
            created=self.created, updated=self.updated,
        )  # fmt: skip


class Drawer:
    """A folder with a file for each job: what is reported of it, and while it has not ended its messages."""

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder, self._files = folder, files

    def keep(self, job: Job) -> None:
        """Write a job down, durably, in place of what was written of it. Raises OSError."""
        if not self._folder.exists():
            self._folder.mkdir(mode=0o700)
            self._files.sync_folder(self._folder.parent)
        said = {} if job.ended else {"said": job.said}
        content = json.dumps({**job.info(), **said}).encode()
        self._files.write_durably(self._path(job.id), [content])

    def drop(self, job: Job) -> None:
        """Raises OSError."""
        self._files.unlink(self._path(job.id))

    def kept(self) -> Iterator[Job]:
        """All jobs that can be read; those that had not ended are to be done. Sweeps what a crash left."""
        for path in sorted(self._folder.glob(f"*{TEMPORARY}")):
            path.unlink()
        for path in sorted(self._folder.glob("job-*.json")):
            try:
                job = Job(**{"said": [], **json.loads(path.read_bytes())})
                assert path == self._path(job.id)
                if not job.ended:
                    job.request()
                    job.state = "queued"
            except Exception as error:
                log.warning("%s is no job and stays where it is: %s", path.name, error)
                continue
            yield job

    def _path(self, id_: str) -> Path:
        return self._folder / f"{id_}.json"
