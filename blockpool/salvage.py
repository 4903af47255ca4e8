"""Rebuilding the index: token log from what is readable of the old file, pages from the headers of the extents.

build the new index beside the old one -> rename to index.salvaged -> put the old one aside -> rename to index.sqlite

Whatever moment the process dies at, the next start goes on from there.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.blockpool.carve import carve
from agentmem.blockpool.chains import Chains
from agentmem.blockpool.extent import SUFFIX
from agentmem.blockpool.failpoint import failpoint
from agentmem.blockpool.files import Files, why_not
from agentmem.blockpool.index import Index
from agentmem.blockpool.page import numbered
from agentmem.blockpool.rows import (
    AgentRow,
    SessionRow,
    TurnRow,
    agent_row,
    open_turn,
    row_sum,
    turn_row,
    unpack,
)
from agentmem.blockpool.schema import IndexDamaged
from agentmem.blockpool.vault import Locked, Vaults
from agentmem.errors import StoreError

log = logging.getLogger(__name__)

SALVAGED = "index.salvaged"
WANTED = "index.rebuild"
_FLOATS = {"agents": (3, 4), "turns": (8,)}  # SQLite keeps whole floats as integers


@dataclass(slots=True)
class SessionLog:
    """What is left of one session: where its state belongs, and its own turns by number."""

    row: SessionRow
    place: tuple[str, str, str]
    turns: dict[int, TurnRow] = field(default_factory=dict)


@dataclass(slots=True)
class Primary:
    """What only the index knows, as far as it could be read."""

    agents: dict[int, AgentRow] = field(default_factory=dict)
    sessions: dict[int, SessionLog] = field(default_factory=dict)
    lost_turns: int = 0


@dataclass(slots=True)
class Salvage:
    """What a rebuilt index holds, and what could not be kept. `bad`: {extent file name: what is wrong with it}."""

    reason: str
    agents: int = 0
    sessions: int = 0
    turns: int = 0
    lost_turns: int = 0
    pages: int = 0
    extents: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def open_index(
    folder: Path, fingerprint: str, text_identity: str, files: Files, vaults: Vaults | None = None
) -> tuple[Index, Salvage | None]:
    """The index of a store, checked; rebuilt before where it is damaged, or missing beside extents.

    Raises StoreError when another release wrote it, or when the file system does not let us.
    """
    path = folder / "index.sqlite"
    report = None
    try:
        finish(folder, files)
        try:
            if (folder / WANTED).exists():
                raise IndexDamaged("asked for")
            if not _has_content(path) and any(n.endswith(SUFFIX) for n in os.listdir(folder / "extents")):
                raise IndexDamaged("the index is missing")
            return _checked(path, fingerprint, text_identity, files.durable, vaults), None
        except (IndexDamaged, IsADirectoryError) as damage:
            report = rebuild(folder, files, str(damage), vaults)
            (folder / WANTED).unlink(missing_ok=True)
        return _checked(path, fingerprint, text_identity, files.durable, vaults), report
    except (OSError, sqlite3.Error) as e:
        raise StoreError(f"{path} cannot be opened: {why_not(e)}") from e


def ask_for_rebuild(folder: Path) -> None:
    """Make the next start rebuild the index of a store."""
    os.close(os.open(folder / WANTED, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _has_content(path: Path) -> bool:
    try:
        return path.lstat().st_size > 0
    except FileNotFoundError:
        return False


def _checked(path: Path, fingerprint: str, text_identity: str, durable: bool, vaults: Vaults | None) -> Index:
    index = Index(path, fingerprint, text_identity, durable=durable, vaults=vaults)
    try:
        index.check()
    except BaseException:
        index.close()
        raise
    return index


def rebuild(folder: Path, files: Files, reason: str, vaults: Vaults | None = None) -> Salvage:
    """Replace the index of a store by one made from what can be read; the old file goes to the quarantine folder.

    Nothing is deleted: damaged extents, and those that no session's tokens lead to, go there too.
    Precondition: nobody has the index open. Raises OSError when the new file cannot be written.
    """
    path, report = folder / "index.sqlite", Salvage(reason)
    primary = _opened(read_primary(path), vaults)
    chains = Chains(folder / "extents", vaults)
    fresh = folder / "index.new"
    for leftover in _files_of(fresh):
        leftover.unlink(missing_ok=True)
    _write(fresh, primary, chains, report, vaults)
    failpoint("salvage.written")
    files.publish(fresh, folder / SALVAGED)
    failpoint("salvage.published")
    finish(folder, files)
    failpoint("salvage.done")
    report.bad, report.unused = chains.bad, chains.unused
    for name in (*report.bad, *report.unused):
        if (folder / "extents" / name).exists() or (folder / "extents" / name).is_symlink():
            files.move(folder / "extents" / name, folder / "quarantine")
    log.warning(
        "the index was rebuilt (%s): %d agents, %d turns (%d lost), %d pages; %d extents put aside",
        reason, report.agents, report.turns, report.lost_turns, report.pages, len(report.bad) + len(report.unused),
    )  # fmt: skip
    return report


def finish(folder: Path, files: Files) -> None:
    """Put a rebuilt index in its place, where one is ready."""
    if not (folder / SALVAGED).exists():
        return
    for old in _files_of(folder / "index.sqlite"):
        if old.exists() or old.is_symlink():
            files.move(old, folder / "quarantine")
            failpoint("salvage.aside")
    files.publish(folder / SALVAGED, folder / "index.sqlite")


def _files_of(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", "-journal", "")]


def read_primary(path: Path) -> Primary:
    """Agents, sessions and turns of an index file: every row or copy whose sum is right."""
    primary = Primary()
    sessions: dict[int, SessionRow] = {}
    spaces: dict[int, tuple[str, str, str]] = {}
    session_space: dict[int, int] = {}
    turns: dict[tuple[int, int], TurnRow] = {}
    for rowid, columns in carve(path):
        try:
            found = _recognise(rowid, columns)
        except (ValueError, TypeError, zlib.error, IndexError):
            continue
        if found is None:
            continue
        table, row = found
        if table == "agents":
            _keep_newest(primary.agents, agent_row(row))
        elif table == "spaces":
            spaces[row[0]] = (row[1], row[2], row[3])
        elif table == "turns":
            turns[row[0], row[1]] = turn_row(row)
        elif table == "sessions":
            id_, agent, name, space, _, base, base_turn = row
            sessions[id_], session_space[id_] = SessionRow(id_, agent, name, None, base, base_turn), space
        else:
            id_, agent, name, *place, base, base_turn = row
            session = SessionRow(id_, agent, name, None, base, base_turn)
            primary.sessions[id_] = SessionLog(session, (place[0], place[1], place[2]))
    for id_, session in sessions.items():
        if id_ not in primary.sessions and session_space[id_] in spaces:
            primary.sessions[id_] = SessionLog(session, spaces[session_space[id_]])
    for (id_, n), turn in turns.items():
        if id_ in primary.sessions:
            primary.sessions[id_].turns[n] = turn
        else:
            primary.lost_turns += 1
    return _consistent(primary)


def _consistent(primary: Primary) -> Primary:
    """What fits together: every session has an agent, every base is there, no name is used twice."""
    for session in primary.sessions.values():
        row = session.row
        if row.agent not in primary.agents:
            made = max((t.created for t in session.turns.values()), default=0.0)
            space = session.place[1]
            namespace = re.split(r"[#!]", space)[0]
            primary.agents[row.agent] = AgentRow(
                row.agent, namespace, f"recovered-{row.agent}", made, made, {},
                lineage={} if space == namespace else {"space": space},
            )  # fmt: skip
        if row.base is not None and row.base not in primary.sessions:
            row.base, row.base_turn = None, 0
    names: dict[tuple[str, str], AgentRow] = {}
    for agent in sorted(primary.agents.values(), key=lambda a: a.last_used):
        older = names.get((agent.namespace, agent.name))
        if older is not None:
            older.name = f"{older.name[:40]}-{older.id}"
        names[agent.namespace, agent.name] = agent
    return primary


def _recognise(rowid: int, columns: list[Any]) -> tuple[str, tuple[Any, ...]] | None:
    """(table, row without its sum) of a decoded row of ours whose sum is right. A copy is told as the table it is a copy of."""
    width = len(columns)
    *values, total = columns or [None]
    if width == 5 and isinstance(values[3], bytes) and row_sum("copies", values) == total:
        return _recognise_copy(values)
    for table, wanted in (("spaces", 5), ("agents", 9), ("sessions", 8), ("turns", 10)):
        if width != wanted:
            continue
        row = [rowid if i == 0 and v is None and table != "turns" else v for i, v in enumerate(values)]
        for i in _FLOATS.get(table, ()):
            row[i] = float(row[i])
        if row_sum(table, row) == total:
            return table, tuple(row)
    return None


def _recognise_copy(copy: list[Any]) -> tuple[str, tuple[Any, ...]]:
    _, session, n, data = copy
    if session == 0:
        return "agents", unpack(data)
    return ("session copies", unpack(data)) if n == 0 else ("turns", unpack(data, binary=4))


def _keep_newest(agents: dict[int, AgentRow], agent: AgentRow) -> None:
    if agent.id not in agents or agents[agent.id].last_used < agent.last_used:
        agents[agent.id] = agent


def _whole(primary: Primary, session: SessionLog) -> tuple[list[TurnRow], list[TurnRow]]:
    """(turns inherited from the base, own turns), each as far as no turn is missing."""
    row = session.row
    base = primary.sessions.get(row.base) if row.base is not None else None
    inherited = [t for part in _whole(primary, base) for t in part if t.n <= row.base_turn] if base else []
    own: list[TurnRow] = []
    while (turn := session.turns.get(len(inherited) + len(own) + 1)) is not None:
        own.append(turn)
    return inherited, own


def _tokens(turns: list[TurnRow]) -> np.ndarray:
    """The token ids of a session after these turns, or those of the chain of pages that its last one names."""
    match turns[-1].stats.get("chain") if turns else None:
        case [int(number), int(rows)] if 0 <= number < 1 << 31 and 0 < rows < 1 << 31:
            return numbered(number, rows)
    ids = np.zeros(0, np.int32)
    for turn in turns:
        ids = np.concatenate([ids[: turn.keep_tokens], turn.ids])
    return ids


def _opened(primary: Primary, vaults: Vaults | None) -> Primary:
    """Sealed turns in plain text, where their key is there; the others stay as they are."""
    for session in primary.sessions.values():
        try:
            seal = vaults.seal(session.place[1]) if vaults is not None else None
            if seal is not None:
                session.turns = {n: open_turn(t, seal) for n, t in session.turns.items()}
        except Locked:
            continue
    return primary


def _write(path: Path, primary: Primary, chains: Chains, report: Salvage, vaults: Vaults | None) -> None:
    """Make the new index. What belongs to a fingerprint is written by an `Index` of that fingerprint."""
    report.lost_turns = primary.lost_turns
    texts = {session.place[0]: session.place[2] for session in primary.sessions.values()}
    open_: dict[str, Index] = {}

    def index_of(fingerprint: str) -> Index:
        if fingerprint not in open_:
            open_[fingerprint] = Index(
                path, fingerprint, texts.get(fingerprint, ""), durable=False, vaults=vaults
            )
        return open_[fingerprint]

    try:
        for agent in primary.agents.values():
            index_of("").update_agent(agent)
        for session in sorted(primary.sessions.values(), key=lambda s: s.row.id):
            agent = primary.agents[session.row.agent]
            inherited, own = _whole(primary, session)
            report.lost_turns += len(session.turns) - len(own)
            report.turns += len(own)
            _write_session(session, agent, _tokens([*inherited, *own]), own, chains, index_of, report)
        report.agents, report.sessions = len(primary.agents), len(primary.sessions)
        report.extents = len(chains.used)
    finally:
        index_of("").checkpoint()
        for index in open_.values():
            index.close()


def _write_session(
    session: SessionLog, agent: AgentRow, ids: np.ndarray, own: list[TurnRow], chains: Chains,
    index_of: Callable[[str], Index], report: Salvage,
) -> None:  # fmt: skip
    """One session, and the pages that its tokens lead to: those of models that were used before, too."""
    fingerprint, namespace, _ = session.place
    for place in {fingerprint, *chains.fingerprints(namespace)}:
        chain = chains.along(place, namespace, ids)
        index_of(place).add_pages(namespace, chain.pages, chain.extents)
        report.pages += len(chain.pages)
        if place == fingerprint:
            row = session.row
            row.turns, row.head = own, chain.head.id if chain.head is not None else None
    index_of(fingerprint).adopt(agent, [(session.row, session.row.head)], [], None, None)
