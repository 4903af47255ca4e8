"""The manifest of an archive: what an exported agent says about itself, and every check that makes it safe to believe.

Archives are untrusted. Page keys are never read from one, they follow from the tokens; spans, turns and pages must agree with the
tables of token ids. What cannot be checked is whether a page's rows belong to its tokens: imported state is as trustworthy
as whoever made the file.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentmem.blockpool.archive import Archive, ArchiveInvalid
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.index import TurnRow
from agentmem.compose.reuse import Planner, Reuse
from agentmem.engine.request import check_name
from agentmem.episode.policy import MemoryPolicy, memory_policy
from agentmem.errors import BadRequest

MAX_SESSIONS = 10_000
MAX_TURNS = 10_000
MAX_PAGES = 1 << 22

Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Time = Annotated[float, Field(ge=0, lt=1 << 40, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Integer = Annotated[int, Field(ge=-(1 << 62), lt=1 << 62)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
Fact = bool | Integer | Number | Annotated[str, Field(max_length=1000)] | None
Facts = Annotated[dict[Key, Fact], Field(max_length=64)]
Span = tuple[Literal["prompt", "reply", "end"], Annotated[int, Field(ge=1, lt=1 << 31)], str | None]

# [parent page or null, raw, rows]: where rows lie follows from the order of the pages.
PageRecord = tuple[Count | None, bool, Annotated[int, Field(ge=1, le=1 << 16)]]


class Part(BaseModel):
    # Errors end in logs, so they do not show what was said.
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class MessageRecord(Part):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class TurnRecord(Part):
    """One entry of the token log; its ids are the next `ids` ones of the archive's `log`."""

    keep_tokens: Count
    keep_messages: Count
    ids: Count
    spans: list[Span]
    messages: list[MessageRecord]
    stats: Facts
    created: Time


class SessionRecord(Part):
    """A session. `head` is the number of the last page of its state."""

    name: str
    head: Count | None
    turns: Annotated[list[TurnRecord], Field(min_length=1, max_length=MAX_TURNS)]


class PolicyRecord(Part):
    """What was asked of the agent. `persist` stays behind: an import is for keeping."""

    pinned: bool = False
    quota_bytes: Annotated[int, Field(ge=1, lt=1 << 63)] | None = None
    reuse: Reuse | None = None
    planner: Planner | None = None
    memory: MemoryPolicy | None = None


class Manifest(Part):
    """Everything of an archive that is not a token id or a row. `text` is the hash of tokenizer and chat template."""

    fingerprint: Hash
    text: Hash
    model: Annotated[str, Field(max_length=256)]
    page_tokens: Annotated[int, Field(ge=1, le=1 << 16)]
    agent: str
    created: Time
    last_used: Time
    totals: Annotated[dict[Key, Count], Field(max_length=64)]
    policy: PolicyRecord = PolicyRecord()
    pages: Annotated[list[PageRecord], Field(max_length=MAX_PAGES)]
    sessions: Annotated[list[SessionRecord], Field(min_length=1, max_length=MAX_SESSIONS)]


def facts(stats: dict[str, Any]) -> dict[str, Any]:
    """The part of a turn's stats that travels: single values."""
    return {k: v for k, v in stats.items() if v is None or isinstance(v, bool | int | float | str)}


def policy_record(policy: dict[str, Any]) -> PolicyRecord:
    """The part of an agent's policy that travels."""
    return PolicyRecord(
        pinned=policy.get("pinned", False),
        quota_bytes=policy.get("quota_bytes"),
        reuse=policy.get("reuse"),
        planner=policy.get("planner"),
        memory=memory_policy(policy) if policy.get("memory") is not None else None,
    )


def policy_of(manifest: Manifest, *, trust: bool) -> dict[str, Any]:
    """The policy of an agent that comes in.

    A pin takes room from other agents, and from one that composes others learn: only one that is trusted brings these.
    """
    record = manifest.policy
    pinned = {"pinned": True} if record.pinned and trust else {}
    quota = {"quota_bytes": record.quota_bytes} if record.quota_bytes is not None else {}
    may = record.reuse is not None and (trust or record.reuse in ("exact", "off"))
    reuse = {"reuse": record.reuse} if may else {}
    planner = {"planner": record.planner} if record.planner is not None and trust else {}
    memory = {"memory": record.memory.model_dump()} if record.memory is not None else {}
    return pinned | quota | reuse | planner | memory


def read_manifest(archive: Archive) -> Manifest:
    """The manifest of an archive, its fields checked one by one. Raises ArchiveInvalid."""
    try:
        manifest = Manifest.model_validate_json(archive.manifest)
        for name, what in ((manifest.agent, "agent"), *((s.name, "session") for s in manifest.sessions)):
            check_name(name, what)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise ArchiveInvalid("manifest", f"{place or 'manifest'}: {first['msg']}") from None
    except BadRequest as error:
        raise ArchiveInvalid("manifest", error.message) from None
    if len({s.name for s in manifest.sessions}) != len(manifest.sessions):
        raise ArchiveInvalid("manifest", "two sessions have one name")
    return manifest


def check_log(manifest: Manifest, archive: Archive, vocabulary: int | None) -> list[list[int]]:
    """Replay the token log; returns each session's ids. `vocabulary` bounds the ids, where they mean something here.

    Raises ArchiveInvalid.
    """
    if sum(t.ids for s in manifest.sessions for t in s.turns) != len(archive.log):
        raise ArchiveInvalid("log", "the turns name more or fewer token ids than the log holds")
    top = vocabulary if vocabulary is not None else 1 << 31
    for name, named in (("log", archive.log), ("tokens", archive.tokens)):
        if named.size and (int(named.min()) < 0 or int(named.max()) >= top):
            raise ArchiveInvalid("log", f"{name} holds token ids beyond the vocabulary of {top}")
    at, replayed = 0, list[list[int]]()
    for session in manifest.sessions:
        ids, messages = list[int](), 0
        for n, turn in enumerate(session.turns, 1):
            _check_turn(turn, f"turn {n} of session {session.name}", len(ids), messages)
            del ids[turn.keep_tokens :]
            ids.extend(archive.log[at : at + turn.ids].tolist())
            at += turn.ids
            messages = turn.keep_messages + len(turn.messages)
        replayed.append(ids)
    return replayed


def _check_turn(turn: TurnRecord, what: str, ids: int, messages: int) -> None:
    if turn.keep_tokens > ids or turn.keep_messages > messages:
        raise ArchiveInvalid("log", f"{what} keeps more than the session had")
    if sum(n for _, n, _ in turn.spans) != turn.ids:
        raise ArchiveInvalid("log", f"the spans of {what} are not as long as its token ids")


def check_pages(
    manifest: Manifest, archive: Archive, geometry: Geometry, replayed: list[list[int]]
) -> list[np.ndarray]:
    """Check the pages against the geometry, the tables and the sessions; returns each page's token ids. Raises ArchiveInvalid."""
    words = tuple(zip(geometry.packed_words, geometry.raw_words, strict=True))
    if archive.shape.words != words or manifest.page_tokens != geometry.page_tokens:
        raise ArchiveInvalid(
            "geometry", "layers, rows or pages have other sizes than the fingerprint stands for"
        )
    for raw, rows in ((False, archive.shape.packed_rows), (True, archive.shape.raw_rows)):
        if sum(p[2] for p in manifest.pages if p[1] == raw) != rows:
            raise ArchiveInvalid("pages", "the pages name more or fewer rows than the archive holds")
    _check_tree(manifest, geometry)
    ends = np.cumsum([0, *(p[2] for p in manifest.pages)])
    tokens = [archive.tokens[a:b] for a, b in pairwise(ends)]
    reached: set[int] = set()
    for session, ids in zip(manifest.sessions, replayed, strict=True):
        chain = chain_of(manifest, session.head, len(ids))
        reached.update(chain)
        state = np.concatenate([tokens[i] for i in chain]) if chain else np.zeros(0, np.int32)
        if not np.array_equal(state, np.array(ids[: len(state)], np.int32)):
            raise ArchiveInvalid(
                "pages", f"the pages of session {session.name} hold other tokens than its log"
            )
    if len(reached) != len(manifest.pages):
        raise ArchiveInvalid("pages", "there are pages that no session leads to")
    return tokens


def _check_tree(manifest: Manifest, geometry: Geometry) -> None:
    """Parents come before children; each page is of the kind and length that its place allows."""
    format = geometry.format
    parents = {p[0] for p in manifest.pages}
    for i, (parent, raw, rows) in enumerate(manifest.pages):
        if parent is not None and parent >= i:
            raise ArchiveInvalid("pages", f"page {i} comes before its parent")
        if rows > geometry.page_tokens:
            raise ArchiveInvalid("pages", f"page {i} has {rows} rows, pages have {geometry.page_tokens}")
        sealed_raw = not format.packs or (format.raw_first_page and parent is None)
        tail = raw and rows < geometry.page_tokens
        if (tail and i in parents) or (not tail and raw != sealed_raw):
            raise ArchiveInvalid("pages", f"page {i} cannot be of this kind at its place")


def chain_of(manifest: Manifest, head: int | None, most: int) -> list[int]:
    """Numbers of the pages from the first one to `head`, at most `most` of them. Raises ArchiveInvalid."""
    if head is not None and head >= len(manifest.pages):
        raise ArchiveInvalid("pages", f"there is no page {head}")
    chain: list[int] = []
    while head is not None:
        # Every page holds a token. Without this limit, sessions that share pages would multiply the work.
        if len(chain) == most:
            raise ArchiveInvalid("pages", "a session has more pages than tokens")
        chain.append(head)
        head = manifest.pages[head][0]
    return chain[::-1]


def turn_rows(
    session: SessionRecord, log: np.ndarray, first: int, *, text: bool
) -> tuple[list[TurnRow], int]:
    """Log entries of a session whose ids begin at `first`; returns them and where the next session's begin.

    Without `text` (another tokenizer or chat template made the ids) only messages are kept.
    """
    rows = []
    for n, turn in enumerate(session.turns, 1):
        ids = np.array(log[first : first + turn.ids], np.int32)
        first += turn.ids
        spans = [list(s) for s in turn.spans] if text else []
        messages = [m.model_dump() for m in turn.messages]
        keep = turn.keep_tokens if text else 0
        stats = {k: v for k, v in turn.stats.items() if k not in ("agent", "turn", "created")}
        rows.append(
            TurnRow(
                n, keep, turn.keep_messages, ids if text else ids[:0], spans, messages, stats, turn.created
            )
        )
    return rows, first
