"""Import: an archive becomes an agent of this home, whole or not at all.

Imported pages lie in a tree of their own, so that no other agent ever continues from rows whose origin nobody here can vouch for.
With `trust` they join the namespace's tree, and pages that are there already, token for token and byte for byte, are shared. A
pin counts only then, too; a quota always does.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import numpy as np

from agentmem.blockpool.archive import Archive, ArchiveInvalid
from agentmem.blockpool.extent import ExtentData
from agentmem.blockpool.index import AgentRow, ExtentRow, Index, SessionRow
from agentmem.blockpool.page import Page, Piece
from agentmem.blockpool.siblings import ordered
from agentmem.engine.commit_rows import page_record
from agentmem.engine.conversation import Conversation
from agentmem.engine.departure import Identity, WhenIdle
from agentmem.engine.fetch import Call, Fetch
from agentmem.engine.manifest import Manifest, check_log, check_pages, policy_of, read_manifest, turn_rows
from agentmem.engine.memory import Agent, Memory, Session
from agentmem.engine.request import check_name
from agentmem.errors import AlreadyExists, BadArchive, StoreError
from agentmem.model.chat import ChatTokenizer

Kept = Literal["state", "tokens", "messages"]


@dataclass(slots=True)
class Parcel:
    """A checked archive on its way in. `tokens` has each page's ids; `pages` each page's node once there is one."""

    archive: Archive
    manifest: Manifest
    kept: Kept
    namespace: str
    name: str
    trust: bool
    tokens: list[np.ndarray]
    space: str
    shared: dict[int, Page] = field(default_factory=dict)
    pages: list[Page] = field(default_factory=list)
    pieces: list[tuple[Piece, ...]] = field(default_factory=list)
    extent: ExtentRow | None = None
    agent: Agent | None = None


class Arrival:
    """Takes archives in. `admit` may be called from any thread but the engine's."""

    def __init__(
        self,
        call: Call,
        when_idle: WhenIdle,
        memory: Memory,
        tokenizer: ChatTokenizer,
        fetch: Fetch,
        identity: Identity,
        check_free: Callable[[str, str], None],
    ) -> None:
        self._call, self._when_idle, self._memory, self._fetch = call, when_idle, memory, fetch
        self._check_free = check_free
        self._pool, self._store = memory.pool, memory.store
        self._tokenizer, self._identity = tokenizer, identity

    def admit(
        self, file: IO[bytes], namespace: str, name: str | None, *, trust: bool, force: bool
    ) -> dict[str, Any]:
        """Import an archive as agent `name` (default: the name it was exported under); `force` replaces an agent of that name.

        Returns the name and what was kept ("state": continues as it was; "tokens": its state is computed again at its next turn;
        "messages": only the texts, because tokenizer or chat template differ) and how many pages and bytes that took.
        Raises BadArchive, AlreadyExists, StoreError, and ConversationBusy while the agent reads a transcript in the background.
        """
        try:
            parcel = self._open(file, namespace, name, trust)
        except ArchiveInvalid as error:
            raise BadArchive(
                f"this file cannot be imported: {error}", param="file", code=f"archive_{error.flaw}"
            ) from None
        key = (parcel.namespace, parcel.name)
        self._check_free(*key)
        self._reserve(key, force)
        try:
            return self._settle(parcel)
        finally:
            self._call(lambda: self._memory.reserved.discard(key))

    def _open(self, file: IO[bytes], namespace: str, name: str | None, trust: bool) -> Parcel:
        """Check everything that can be checked before anything is changed."""
        archive = Archive(file.fileno())
        manifest = read_manifest(archive)
        same_text = manifest.text == self._identity.text
        ids = check_log(manifest, archive, self._tokenizer.vocab_size if same_text else None)
        kept: Kept = "tokens" if same_text else "messages"
        tokens: list[np.ndarray] = []
        if manifest.fingerprint == self._identity.fingerprint:
            if not same_text:
                raise ArchiveInvalid("manifest", "the fingerprint is ours, the tokenizer is not")
            archive.verify()
            tokens = check_pages(manifest, archive, self._pool.geometry, ids)
            kept = "state" if tokens else "tokens"
        name = check_name(name or manifest.agent)
        return Parcel(archive, manifest, kept, namespace, name, trust, tokens, space=namespace)

    def _reserve(self, key: tuple[str, str], force: bool) -> None:
        """Keep the name: no turn may make or use an agent of this name until the import is over."""

        def reserve(*_: Any) -> None:
            if key in self._memory.reserved:
                raise AlreadyExists(f"agent {key[1]!r} is being imported already", param="agent")
            if self._memory.agent(*key) is not None and not force:
                raise AlreadyExists(
                    f"there is an agent {key[1]!r}; import it under another name, or replace it with force",
                    param="agent",
                )
            self._memory.reserved.add(key)

        if force and self._call(lambda: self._memory.agent(*key)) is not None:
            self._when_idle(*key, reserve)
        else:
            self._call(reserve)

    def _settle(self, parcel: Parcel) -> dict[str, Any]:
        try:
            if parcel.kept == "state" and parcel.trust and self._memory.encrypt == "off":
                self._share(parcel)
            self._call(lambda: self._lay_out(parcel))
            size = self._write_rows(parcel)
            self._commit(parcel, self._sessions(parcel))
        except BaseException:
            self._call(lambda: self._give_up(parcel))
            raise
        return {
            "agent": parcel.name,
            "kept": parcel.kept,
            "trusted": parcel.trust,
            "pages": len(parcel.pages),
            "pages_shared": len(parcel.shared),
            "bytes_written": size,
        }

    def _share(self, parcel: Parcel) -> None:
        """Find the pages that are here already, bytes included, and pin them."""
        found = self._call(lambda: self._same_tokens(parcel))
        at, starts = [0, 0], []
        for _, raw, count in parcel.manifest.pages:
            starts.append(at[raw])
            at[raw] += count
        number = {page: i for i, page in found.items()}
        try:
            for group in self._fetch.groups(list(found.values())):
                rows = self._fetch.rows(group)
                read = [0, 0]
                for page in group:
                    i, n = number[page], page.rows
                    here = [a[read[page.raw] : read[page.raw] + n] for a in rows[page.raw]]
                    there = [a[starts[i] : starts[i] + n] for a in parcel.archive.rows(page.raw)]
                    read[page.raw] += n
                    parent = parcel.manifest.pages[i][0]
                    if (parent is None or parent in parcel.shared) and all(map(np.array_equal, here, there)):
                        parcel.shared[i] = page
        finally:
            others = [page for i, page in found.items() if i not in parcel.shared]
            self._call(lambda: self._pool.unpin(others))

    def _same_tokens(self, parcel: Parcel) -> dict[int, Page]:
        """On the engine thread: pages on disk behind the same tokens, pinned."""
        root = self._pool.tree(parcel.namespace).root
        found: dict[int, Page] = {}
        for i, ((parent, raw, _), tokens) in enumerate(
            zip(parcel.manifest.pages, parcel.tokens, strict=True)
        ):
            above = root if parent is None else found.get(parent)
            for page in above.children.same(ordered(tokens)) if above is not None else []:
                if page.raw == raw and page.pieces is not None and np.array_equal(page.tokens, tokens):
                    found[i] = page
                    break
        self._pool.pin(list(found.values()))
        return found

    def _lay_out(self, parcel: Parcel) -> None:
        """On the engine thread: ids, and nodes for the pages. Nobody can use one before its rows are committed."""
        if self._memory.encrypt != "off":
            parcel.space = self._memory.new_vault(parcel.namespace, self._memory.encrypt)
        if parcel.kept != "state":
            return
        if not parcel.trust and self._memory.encrypt == "off":
            parcel.space = f"{parcel.namespace}#{secrets.token_hex(8)}"
        tree = self._pool.tree(parcel.space)
        for i, ((parent, raw, _), tokens) in enumerate(
            zip(parcel.manifest.pages, parcel.tokens, strict=True)
        ):
            page = parcel.shared.get(i)
            if page is None:
                page = tree.add(tree.root if parent is None else parcel.pages[parent], tokens, raw=raw)
                page.id = self._memory.next_id("pages")
                self._pool.pin([page])
            parcel.pages.append(page)
        if len(parcel.shared) < len(parcel.pages):
            parcel.extent = self._memory.ids.extent()

    def _write_rows(self, parcel: Parcel) -> int:
        """Write the rows of the pages that are new as one extent. Returns its bytes."""
        extent = parcel.extent
        if extent is None:
            return 0
        wanted: list[list[np.ndarray]] = [[], []]
        new = [0, 0]
        at = [0, 0]
        tokens: list[list[np.ndarray]] = [[], []]
        for i, page in enumerate(parcel.pages):
            if i not in parcel.shared:
                wanted[page.raw].append(np.arange(at[page.raw], at[page.raw] + page.rows))
                tokens[page.raw].append(page.tokens)
                parcel.pieces.append((Piece(extent.id, page.raw, new[page.raw], 0, page.rows),))
                new[page.raw] += page.rows
            at[page.raw] += page.rows
        records = [
            page_record(p, x, extent.id, {}) for p, x in zip(self._new(parcel), parcel.pieces, strict=True)
        ]
        packed, raw = (
            _pick(parcel.archive.rows(bool(kind)), np.concatenate([np.zeros(0, np.int64), *wanted[kind]]))
            for kind in (0, 1)
        )
        ids = np.concatenate([np.zeros(0, np.int32), *tokens[0], *tokens[1]])
        need = sum(a.nbytes for a in (*packed, *raw))
        if self._store.free_disk() < need + self._store.floor:
            raise StoreError(f"the import takes {need} bytes; with it, less than disk_floor would stay free")
        data = ExtentData(self._identity.fingerprint, parcel.space, ids, packed, raw, records)
        try:
            extent.name, extent.bytes = self._store.write_rows(data)
        except OSError as error:
            raise StoreError(f"the import does not fit or cannot be written: {error}") from error
        return extent.bytes

    @staticmethod
    def _new(parcel: Parcel) -> list[Page]:
        return [p for i, p in enumerate(parcel.pages) if i not in parcel.shared]

    def _sessions(self, parcel: Parcel) -> list[tuple[Session, Page | None]]:
        """Sessions as the memory holds them, their logs replayed; ids are given when they are committed."""
        first, sessions = 0, []
        for record in parcel.manifest.sessions:
            rows, first = turn_rows(record, parcel.archive.log, first, text=parcel.kept != "messages")
            row = SessionRow(0, 0, record.name, None, turns=rows, foreign=parcel.kept != "state")
            session = Session(row, Conversation(self._tokenizer))
            session.replay()
            state = parcel.kept == "state" and record.head is not None
            sessions.append((session, parcel.pages[record.head] if state else None))  # type: ignore[index]
        return sessions

    def _commit(self, parcel: Parcel, sessions: list[tuple[Session, Page | None]]) -> None:
        """One transaction for everything; the agent exists once it is durable."""
        outcome: Future[None] = Future()
        self._call(lambda: self._submit(parcel, sessions, outcome))
        outcome.result()

    def _submit(
        self, parcel: Parcel, sessions: list[tuple[Session, Page | None]], outcome: Future[None]
    ) -> None:
        """On the engine thread."""
        if any(page.pieces is None for page in parcel.shared.values()):
            raise StoreError("pages that this import shares were lost meanwhile; try again")
        memory = self._memory
        old = memory.agent(parcel.namespace, parcel.name)
        agent = Agent(self._agent_row(parcel))
        for session, _ in sessions:
            session.row.id, session.row.agent = memory.next_id("sessions"), agent.row.id
            agent.sessions[session.row.name] = session
        new = list(zip(self._new(parcel), parcel.pieces, strict=True))
        heads = [(s.row, head.id if head is not None else None) for s, head in sessions]

        def write(index: Index) -> None:
            index.adopt(agent.row, heads, new, parcel.extent, old.row.id if old is not None else None)

        def done(error: Exception | None) -> None:
            if error is not None:
                outcome.set_exception(StoreError(f"the import could not be committed: {error}"))
                return
            for page, pieces in new:
                page.pieces = pieces
            self._pool.unpin(parcel.pages)
            parcel.agent = agent
            if old is not None:
                memory.forget(old, lambda *_: None)
            memory.attach(agent, {s.row.name: head for s, head in sessions})
            memory.journal.settled(agent)
            outcome.set_result(None)

        self._store.adopt(parcel.extent, write, done)

    def _agent_row(self, parcel: Parcel) -> AgentRow:
        manifest, now = parcel.manifest, time.time()
        lineage: dict[str, Any] = {
            "imported": {
                "agent": manifest.agent,
                "model": manifest.model,
                "kept": parcel.kept,
                "trusted": parcel.trust,
                "at": now,
            }
        }
        if parcel.space != parcel.namespace:
            lineage["space"] = parcel.space
        return AgentRow(
            self._memory.next_id("agents"), parcel.namespace, parcel.name, manifest.created, now,
            dict(manifest.totals), policy_of(manifest, trust=parcel.trust), lineage,
        )  # fmt: skip

    def _give_up(self, parcel: Parcel) -> None:
        """On the engine thread: nothing of the import stays."""
        if parcel.agent is not None:
            return
        if parcel.extent is not None and parcel.extent.name:
            self._store.files.unlink(self._store.extents / parcel.extent.name)
        new = self._new(parcel)
        self._pool.unpin([*new, *parcel.shared.values()])
        for page in reversed(new):
            self._pool.discard(page)


def _pick(layers: list[np.ndarray], rows: np.ndarray) -> list[np.ndarray]:
    """The chosen rows of every layer: views where they follow each other, as they do unless pages are shared."""
    if rows.size and rows[-1] - rows[0] == rows.size - 1:
        return [a[rows[0] : rows[-1] + 1] for a in layers]
    return [a[rows] for a in layers]
