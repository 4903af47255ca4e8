"""Export: everything that an agent remembers, as one file that another machine can import."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np
from pydantic import ValidationError

from agentmem.blockpool.archive import ArchiveInvalid, ArchiveWriter, Shape
from agentmem.blockpool.index import TurnRow
from agentmem.blockpool.page import Page
from agentmem.engine.fetch import Call, Fetch
from agentmem.engine.manifest import (
    Manifest,
    MessageRecord,
    PageRecord,
    PolicyRecord,
    SessionRecord,
    TurnRecord,
    facts,
    policy_record,
)
from agentmem.engine.memory import Memory, Session, locked
from agentmem.errors import BadRequest, StoreError

T = TypeVar("T")


class WhenIdle(Protocol):
    """Runs a job on the engine thread once the agent is not speaking and all turns are written. Raises NotFound, Overloaded."""

    def __call__(self, namespace: str, name: str, job: Callable[[], T]) -> T: ...


@dataclass(frozen=True, slots=True)
class Identity:
    """What state and token ids of this daemon belong to: hashes, and the model's public name."""

    fingerprint: str
    text: str
    model: str


@dataclass(slots=True)
class Snapshot:
    """An agent at one moment. Its heads are held, so that no page of it goes away."""

    agent: str
    created: float
    last_used: float
    totals: dict[str, int]
    policy: PolicyRecord
    sessions: list[tuple[str, list[TurnRow], Page | None, bool]]
    held: list[Page]


def scratch_file(folder: Path) -> IO[bytes]:
    """A file without a name: nothing is left of it when it is closed, however the process ends."""
    fd, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.unlink(name)
    return os.fdopen(fd, "w+b")


class Departure:
    """Writes archives. Its methods may be called from any thread but the engine's."""

    def __init__(
        self, call: Call, when_idle: WhenIdle, memory: Memory, fetch: Fetch, identity: Identity
    ) -> None:
        self._call, self._when_idle, self._memory, self._fetch = call, when_idle, memory, fetch
        self._identity = identity

    def export(self, namespace: str, name: str) -> IO[bytes]:
        """The agent's archive, a nameless file that stands at its start; the caller closes it.

        Rows are copied as they are stored. Raises NotFound, AgentLocked, Overloaded, StoreError, and BadRequest for an agent
        without turns or with more text than an archive holds.
        """
        snapshot = self._when_idle(namespace, name, lambda: self._take(namespace, name))
        try:
            if not snapshot.sessions:
                raise BadRequest(
                    f"agent {name!r} has no turns yet; there is nothing to export", param="agent"
                )
            file = scratch_file(self._memory.store.folder)
            try:
                self._write(snapshot, file.fileno())
                file.seek(0)
            except BaseException:
                file.close()
                raise
            return file
        except (ArchiveInvalid, ValidationError) as error:
            raise BadRequest(f"agent {name!r} cannot be exported: {error}", param="agent") from error
        except OSError as error:
            raise StoreError(f"there is no room for the archive of agent {name!r}: {error}") from error
        finally:
            self._call(lambda: self._release(snapshot))

    def _take(self, namespace: str, name: str) -> Snapshot:
        """On the engine thread, where `when_idle` has found the agent."""
        agent = self._memory.agent(namespace, name)
        assert agent is not None
        if agent.locked:
            raise locked(name)
        carries = bool(self._memory.pool.geometry.carried_words)  # what is carried along does not travel
        sessions = [
            (s.row.name, list(s.row.turns), None if carries else _stored(s), s.row.text)
            for s in agent.spoken.values()
            if s.row.turns
        ]
        held = [head for _, _, head, _ in sessions if head is not None]
        for page in held:
            page.heads += 1
        row = agent.row
        policy = policy_record(row.policy)
        return Snapshot(row.name, row.created, row.last_used, dict(row.totals), policy, sessions, held)

    def _release(self, snapshot: Snapshot) -> None:
        for page in snapshot.held:
            page.heads -= 1

    def _write(self, snapshot: Snapshot, fd: int) -> None:
        chains = [head.chain() if head is not None else [] for *_, head, _ in snapshot.sessions]
        pages = list(dict.fromkeys(p for chain in chains for p in chain))
        g = self._memory.pool.geometry
        turns = [t for _, rows, _, text in snapshot.sessions if text for t in rows]
        log = np.concatenate([np.zeros(0, np.int32), *(t.ids for t in turns)])
        tokens = np.concatenate([np.zeros(0, np.int32), *(p.tokens for p in pages)])
        rows = {raw: sum(p.rows for p in pages if p.raw == raw) for raw in (False, True)}
        shape = Shape(rows[False], rows[True], len(log), tuple(zip(g.packed_words, g.raw_words, strict=True)))
        manifest = self._manifest(snapshot, pages).model_dump_json()
        writer = ArchiveWriter(fd, shape, manifest, tokens, log)
        at = [0, 0]
        for group in self._fetch.groups(pages):
            for kind, layers in enumerate(self._fetch.rows(group)):
                for layer, part in enumerate(layers):
                    writer.put(bool(kind), layer, at[kind], part)
                at[kind] += len(layers[0])
        writer.finish()

    def _manifest(self, snapshot: Snapshot, pages: list[Page]) -> Manifest:
        number = {page: i for i, page in enumerate(pages)}
        records: list[PageRecord] = [
            (number.get(p.parent) if p.parent is not None else None, p.raw, p.rows) for p in pages
        ]
        return Manifest(
            fingerprint=self._identity.fingerprint,
            text=self._identity.text,
            model=self._identity.model[:256],
            page_tokens=self._memory.pool.geometry.page_tokens,
            agent=snapshot.agent,
            created=snapshot.created,
            last_used=snapshot.last_used,
            totals=snapshot.totals,
            policy=snapshot.policy,
            pages=records,
            sessions=[
                SessionRecord(
                    name=name,
                    head=number[head] if head is not None else None,
                    turns=[_turn(t, text) for t in turns],
                )
                for name, turns, head, text in snapshot.sessions
            ],
        )


def _turn(turn: TurnRow, text: bool) -> TurnRecord:
    """A log entry; without `text`, its ids belong to another tokenizer and stay behind."""
    return TurnRecord(
        keep_tokens=turn.keep_tokens if text else 0,
        keep_messages=turn.keep_messages,
        ids=len(turn.ids) if text else 0,
        spans=[(kind, n, words) for kind, n, words in turn.spans] if text else [],
        messages=[MessageRecord(**m) for m in turn.messages],
        stats=facts(turn.stats),
        created=turn.created,
    )


def _stored(session: Session) -> Page | None:
    """The last page that the session can be continued from. What is veiled stays: only this home's views know what it is of."""
    last = None
    for page in session.head.chain() if session.head is not None else []:
        if page.veiled or (page.slots is None and page.pieces is None):
            break
        last = page
    return last
