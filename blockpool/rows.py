"""Rows of the index as the engine knows them, and their checksums.

Every stored row carries a sum over its columns, so that a bit that flipped is seen when the row is read. What cannot be
rebuilt from extents (agents, sessions, turns) is stored a second time as a packed copy.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.vault import Seal

SEALED = '"sealed"'
_PAGE = struct.Struct("<4sqqqq")
_PIECE = struct.Struct("<4s6q")
_LENGTH = struct.Struct("<I")


@dataclass(slots=True)
class TurnRow:
    """One entry of the token log: what this turn kept of the session before it, and what it added.

    A `sealed` one holds ids, spans, messages and stats as ciphertext only; see `seal_turn`.
    """

    n: int
    keep_tokens: int
    keep_messages: int
    ids: np.ndarray
    spans: list[Any]
    messages: list[dict[str, Any]]
    stats: dict[str, Any]
    created: float
    sealed: bytes | None = None


@dataclass(slots=True)
class SessionRow:
    """A session as the index knows it.

    `head` is the id of the last page of its state, or None. A fork's turns are those of `base` up to `base_turn`, then its
    own; `turns` holds both. `text` is False when another tokenizer or chat template made the ids: then only the messages
    mean something. A `foreign` one has state of another fingerprint. A `locked` one is sealed with a key that is not there: its
    turns are sealed ones.
    """

    id: int
    agent: int
    name: str
    head: int | None
    base: int | None = None
    base_turn: int = 0
    text: bool = True
    turns: list[TurnRow] = field(default_factory=list)
    locked: bool = False
    foreign: bool = False


@dataclass(slots=True)
class AgentRow:
    """An agent as the index knows it.

    `totals` are counters over its life, `policy` what was asked of it (pin, persist), `lineage` where it was forked from.
    """

    id: int
    namespace: str
    name: str
    created: float
    last_used: float
    totals: dict[str, Any]
    policy: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> str:
        """Where the agent's pages lie: its namespace, or a space of its own that shares no page with other agents."""
        return str(self.lineage.get("space", self.namespace))


@dataclass(slots=True)
class ExtentRow:
    id: int
    name: str
    bytes: int


@dataclass(slots=True)
class TurnCommit:
    """Everything that one turn changes, for one transaction. Page and extent ids are assigned beforehand.

    `earlier` are turns of the session before this one that could not be written when they ended.
    """

    agent: AgentRow
    session: SessionRow
    turn: TurnRow
    head: Page | None
    pages: list[tuple[Page, tuple[Piece, ...]]]
    dropped: list[int]
    extent: ExtentRow | None = None
    earlier: list[TurnRow] = field(default_factory=list)


def page_sum(id: int, space: int, parent: int | None, raw: int, tokens: bytes) -> int:
    """Checksum of a row of `pages`: 63 bits of XXH3, which an SQLite integer holds."""
    return xxhash.xxh3_64_intdigest(_PAGE.pack(b"page", id, space, parent or 0, raw) + tokens) >> 1


def piece_sum(page: int, page_row: int, extent: int, raw: int, extent_row: int, rows: int) -> int:
    """Checksum of a row of `pieces`."""
    return xxhash.xxh3_64_intdigest(_PIECE.pack(b"rows", page, page_row, extent, raw, extent_row, rows)) >> 1


def row_sum(table: str, values: Sequence[Any]) -> int:
    """Checksum of a row of any other table: the table's name and every column with its type and length."""
    text = repr((table, *[len(v) if isinstance(v, bytes) else v for v in values]))
    binary = b"".join([v for v in values if isinstance(v, bytes)])
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass") + binary) >> 1


def turn_columns(session: int, turn: TurnRow) -> tuple[Any, ...]:
    """A row of `turns` without its sum."""
    if turn.sealed is not None:
        return (
            session, turn.n, turn.keep_tokens, turn.keep_messages, turn.sealed, SEALED, SEALED, SEALED,
            float(turn.created),
        )  # fmt: skip
    return (
        session, turn.n, turn.keep_tokens, turn.keep_messages, turn.ids.astype("<i4").tobytes(),
        json.dumps(turn.spans), json.dumps(turn.messages), json.dumps(turn.stats), float(turn.created),
    )  # fmt: skip


def turn_row(columns: Sequence[Any]) -> TurnRow:
    """The inverse of `turn_columns`."""
    _, n, keep_tokens, keep_messages, ids, spans, messages, stats, created = columns
    if spans == SEALED:
        return TurnRow(n, keep_tokens, keep_messages, np.zeros(0, np.int32), [], [], {}, created, ids)
    tokens = np.frombuffer(ids, dtype="<i4")
    texts = [json.loads(text) for text in (spans, messages, stats)]
    return TurnRow(n, keep_tokens, keep_messages, tokens, texts[0], texts[1], texts[2], created)


def seal_turn(turn: TurnRow, seal: Seal) -> TurnRow:
    """The turn with what was said in it as ciphertext. One that is sealed already stays as it is."""
    if turn.sealed is not None:
        return turn
    columns = turn_columns(0, turn)
    sealed = seal.seal(pack(columns[4:8]), _turn_label(turn))
    return turn_row((*columns[:4], sealed, SEALED, SEALED, SEALED, turn.created))


def open_turn(turn: TurnRow, seal: Seal) -> TurnRow:
    """The inverse. Raises Locked."""
    if turn.sealed is None:
        return turn
    plain = unpack(seal.open(turn.sealed, _turn_label(turn)), binary=0)
    return turn_row((0, turn.n, turn.keep_tokens, turn.keep_messages, *plain, turn.created))


def _turn_label(turn: TurnRow) -> bytes:
    return f"turn {turn.n} {turn.keep_tokens} {turn.keep_messages}".encode()


def agent_columns(agent: AgentRow) -> tuple[Any, ...]:
    """A row of `agents` without its sum."""
    return (
        agent.id, agent.namespace, agent.name, float(agent.created), float(agent.last_used),
        json.dumps(agent.totals), json.dumps(agent.policy), json.dumps(agent.lineage),
    )  # fmt: skip


def agent_row(columns: Sequence[Any]) -> AgentRow:
    """The inverse of `agent_columns`."""
    id_, namespace, name, created, last_used, *texts = columns
    totals, policy, lineage = (json.loads(t) for t in texts)
    return AgentRow(id_, namespace, name, created, last_used, totals, policy, lineage)


def pack(columns: Sequence[Any]) -> bytes:
    """Columns as one compressed value for the table of copies. One column at most is bytes."""
    binary = next((c for c in columns if isinstance(c, bytes)), b"")
    text = json.dumps([None if isinstance(c, bytes) else c for c in columns]).encode()
    return zlib.compress(_LENGTH.pack(len(text)) + text + binary, 1)


def unpack(data: bytes, binary: int | None = None) -> tuple[Any, ...]:
    """The inverse of `pack`; `binary` is the index of the column that is bytes. Raises ValueError or zlib.error."""
    whole = zlib.decompress(data)
    end = _LENGTH.size + _LENGTH.unpack_from(whole)[0]
    columns = json.loads(whole[_LENGTH.size : end])
    if binary is not None:
        columns[binary] = whole[end:]
    return tuple(columns)
