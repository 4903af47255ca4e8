"""A small engine over the real store: agents that speak, fork, are edited, compacted, dropped and forgotten.

Every row of state is a function of the tokens up to it, so that whoever finds rows can tell whether they are right.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.blockpool.extent import ExtentData
from agentmem.blockpool.page import Page, PageTree, Piece
from agentmem.blockpool.restore import RestorePlan
from agentmem.blockpool.rows import AgentRow, ExtentRow, SessionRow, TurnCommit, TurnRow
from agentmem.blockpool.store import Store
from agentmem.quant.format import LayerShape
from tests.blockpool.layout import PAGE, geometry
from tests.crash.clones import Recorder

FINGERPRINT = "f" * 64
SPACE = "default"
G = geometry(LayerShape(1, 64, 64))
Log = dict[str, Any]


def row_of(parent: bytes, tokens: np.ndarray, i: int, words: int) -> np.ndarray:
    """The state of a page's token number `i`: words that depend on everything up to it."""
    return random_words(int.from_bytes(parent[:8], "little") ^ zlib.crc32(tokens[: i + 1].tobytes()), words)


@lru_cache(maxsize=1 << 13)
def random_words(seed: int, n: int) -> np.ndarray:
    """Always the same for a seed; the clones of a home have most of their rows in common."""
    words = np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)
    words.flags.writeable = False
    return words


def rows_of(page: Page, first: int, last: int) -> np.ndarray:
    """Rows [first, last) of a page as they lie on disk."""
    assert page.parent is not None
    words = (G.raw_words if page.raw else G.packed_words)[0]
    rows = [row_of(page.parent.key, page.tokens, i, words) for i in range(first, last)]
    return np.array(rows, np.uint32).reshape(-1, words)


@dataclass(eq=False)
class Speaker:
    """An agent with one session."""

    agent: AgentRow
    session: SessionRow
    head: Page | None = None
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))


class World:
    """Runs operations one at a time. `log` is what was acknowledged, `doing` what the operation under way would make of it.

    On a folder in which a world lived before, it goes on from what is there.
    """

    def __init__(self, folder: Path, recorder: Recorder, rng: random.Random) -> None:
        self.recorder = recorder
        self.store = Store(folder, FINGERPRINT, files=recorder, durable=False)
        self.tree = PageTree(FINGERPRINT, SPACE)
        self.rng = rng
        self.speakers: dict[str, Speaker] = {}
        self.log: Log = {}
        self.doing: Log = {}
        self._last = (
            dict.fromkeys(("agents", "sessions", "pages", "extents"), 0) | self.store.index.last_ids()
        )
        self._load()

    def _load(self) -> None:
        index = self.store.index
        pages: dict[int, Page] = {}
        for id_, parent, raw, tokens, pieces in index.pages(SPACE):
            page = self.tree.add(pages[parent] if parent is not None else self.tree.root, tokens, raw=raw)
            page.id, page.pieces = id_, pieces
            pages[id_] = page
        agents = {a.id: a for a in index.agents()}
        for session in index.sessions():
            speaker = Speaker(agents[session.agent], session, None, replayed(session.turns))
            self._move(speaker, pages[session.head] if session.head is not None else None)
            self.speakers[speaker.agent.name] = speaker
            self._note(speaker)
            self.log = self.doing

    def _id(self, table: str) -> int:
        self._last[table] += 1
        return self._last[table]

    def _run(self, submit: Callable[[Callable[..., None]], None]) -> None:
        """Submit a job, wait for its end, and let the writer do what follows from it."""
        got: list[tuple[Any, ...]] = []
        submit(lambda *result: got.append(result))
        while not got:
            self.store.completions.get(timeout=30)()
        assert got[0][-1] is None, got[0][-1]
        self.store.flush()
        self.log = self.doing

    def _note(self, speaker: Speaker) -> None:
        self.doing = {**self.log, speaker.agent.name: noted(speaker.agent, speaker.session.turns)}

    def speak(self) -> None:
        """A turn: of an old agent or a new one; it may keep only part of what was."""
        known = list(self.speakers.values())
        if known and (len(known) > 5 or self.rng.random() < 0.8):
            speaker = self.rng.choice(known)
        else:
            n = self._id("agents")
            agent = AgentRow(n, "default", f"agent-{n}", float(n), float(n), {})
            speaker = Speaker(agent, SessionRow(self._id("sessions"), n, "main", None))
            self.speakers[agent.name] = speaker
        keep = len(speaker.ids) if self.rng.random() < 0.8 else self.rng.randrange(len(speaker.ids) + 1)
        new = np.array(
            [self.rng.randrange(6) for _ in range(self.rng.choice([1, 3, PAGE, 3 * PAGE]))], np.int32
        )
        speaker.ids = np.concatenate([speaker.ids[:keep], new])
        n = len(speaker.session.turns) + 1
        turn = TurnRow(
            n, keep, n - 1, new, [["prompt", len(new), None]], [{"role": "user", "content": f"{n} é {new}"}],
            {"n": n}, float(n),
        )  # fmt: skip
        speaker.session.turns.append(turn)
        speaker.agent.last_used += 1.0
        speaker.agent.totals = {"turns": n}
        self._commit(speaker, turn)

    def _commit(self, speaker: Speaker, turn: TurnRow) -> None:
        page, new = self.tree.root, []
        for at in range(0, len(speaker.ids), PAGE):
            tokens = speaker.ids[at : at + PAGE]
            same = [c for c in page.walk() if c.parent is page and np.array_equal(c.tokens, tokens)]
            page = same[0] if same else self.tree.add(page, tokens, raw=len(tokens) < PAGE)
            if page.pieces is None:
                new.append(page)
        dropped = self._superseded(speaker, page)
        for fresh in new:
            fresh.id = fresh.id or self._id("pages")
        extent = ExtentRow(self._id("extents"), "", 0)
        data = self._place(new, extent)
        head = page if page is not self.tree.root else None
        pages = [(p, p.pieces or ()) for p in new]
        commit = TurnCommit(
            speaker.agent,
            speaker.session,
            turn,
            head,
            pages,
            [p.id for p in dropped if p.id],
            extent if new else None,
        )
        self._note(speaker)
        self._move(speaker, head)
        self._run(lambda done: self.store.commit(commit, data if new else None, done))
        for gone in dropped:
            gone.pieces = None
            self.tree.remove(gone)

    def _superseded(self, speaker: Speaker, head: Page) -> list[Page]:
        old = speaker.head
        if old is None or old is head or old.heads > 1 or old.children or not old.raw:
            return []
        return [old]

    def _move(self, speaker: Speaker, head: Page | None) -> None:
        if speaker.head is not None:
            speaker.head.heads -= 1
        speaker.head = head
        if head is not None:
            head.heads += 1

    def _place(self, pages: list[Page], extent: ExtentRow) -> Callable[[], ExtentData]:
        """Give pages their places in a new extent; a tail that has grown refers to the rows it had before."""
        rows: dict[bool, list[np.ndarray]] = {False: [], True: []}
        tokens: dict[bool, list[np.ndarray]] = {False: [], True: []}
        records = []
        for page in pages:
            at = sum(len(r) for r in rows[page.raw])
            page.pieces = (Piece(extent.id, page.raw, at, 0, page.rows),)
            rows[page.raw].append(rows_of(page, 0, page.rows))
            tokens[page.raw].append(page.tokens)
            assert page.parent is not None
            records.append({
                "key": page.key.hex(), "parent": page.parent.key.hex(), "raw": page.raw, "rows": page.rows,
                "pieces": [[None, page.raw, at, 0, page.rows]],
            })  # fmt: skip
        words = {False: G.packed_words[0], True: G.raw_words[0]}
        made = {k: np.concatenate([np.zeros((0, words[k]), np.uint32), *r]) for k, r in rows.items()}
        ids = np.concatenate([np.zeros(0, np.int32), *tokens[False], *tokens[True]])
        return lambda: ExtentData(FINGERPRINT, SPACE, ids, [made[False]], [made[True]], records)

    def fork(self) -> None:
        if not self.speakers:
            return
        parent = self.rng.choice(list(self.speakers.values()))
        at = self.rng.randint(1, len(parent.session.turns))
        n = self._id("agents")
        agent = AgentRow(n, "default", f"fork-{n}", float(n), float(n), {}, {}, {"parent": parent.agent.name})
        turns = parent.session.turns[:at]
        session = SessionRow(self._id("sessions"), n, "main", None, parent.session.id, at, True, list(turns))
        child = Speaker(agent, session, None, replayed(turns))
        head = parent.head if at == len(parent.session.turns) else None
        self.speakers[agent.name] = child
        self._note(child)
        self._move(child, head)
        number = head.id if head is not None else None
        self._run(lambda done: self.store.change(lambda i: i.fork(agent, session, number), done))

    def policy(self) -> None:
        if self.speakers:
            speaker = self.rng.choice(list(self.speakers.values()))
            speaker.agent.policy = {"pin": self.rng.randrange(1000)}
            self._note(speaker)
            self._run(lambda done: self.store.change(lambda i: i.update_agent(speaker.agent), done))

    def forget(self) -> None:
        if self.speakers:
            speaker = self.speakers.pop(self.rng.choice(list(self.speakers)))
            self.doing = {k: v for k, v in self.log.items() if k != speaker.agent.name}
            self._move(speaker, None)
            gone = self._take([p for p in self.tree.pages() if not p.heads])
            self._run(lambda done: self.store.forget(speaker.agent.id, gone, done))

    def _take(self, pages: list[Page]) -> list[int]:
        """Take pages that nobody needs out of the tree; returns their ids."""
        gone = []
        for page in sorted(pages, key=lambda p: -p.start):
            if not page.children and not page.heads:
                if page.id is not None and page.pieces is not None:
                    gone.append(page.id)
                page.pieces = None
                self.tree.remove(page)
        return gone

    def evict(self) -> None:
        """Take some leaves off the disk."""
        leaves = [p for p in self.tree.pages() if not p.children and p.pieces is not None]
        chosen = [p for p in leaves if self.rng.random() < 0.3]
        heads = self._shorten(chosen)
        gone = self._take(chosen)
        self.doing = self.log
        self._run(lambda done: self.store.evict(gone, heads, done))

    def _shorten(self, pages: list[Page]) -> dict[int, int | None]:
        heads: dict[int, int | None] = {}
        for speaker in self.speakers.values():
            if speaker.head in pages:
                kept = [p for p in speaker.head.chain() if p not in pages]
                self._move(speaker, kept[-1] if kept else None)
                heads[speaker.session.id] = kept[-1].id if kept else None
        return heads

    def compact(self) -> None:
        speakers = [s for s in self.speakers.values() if s.head is not None]
        if not speakers:
            return
        head = self.rng.choice(speakers).head
        assert head is not None
        pages = [p for p in head.chain() if p.pieces is not None]
        extent = ExtentRow(self._id("extents"), "", 0)
        data = self._place(pages, extent)
        moved = [(p.id, p.pieces) for p in pages if p.id is not None and p.pieces is not None]
        self.doing = self.log
        self._run(lambda done: self.store.compact(data, extent, moved, done))

    def quarantine(self) -> None:
        """An extent turns out damaged."""
        used = sorted({x.extent for p in self.tree.pages() for x in p.pieces or ()})
        if not used:
            return
        bad = self.rng.choice(used)
        hit = [p for p in self.tree.pages() if any(x.extent == bad for x in p.pieces or ())]
        lost = list(dict.fromkeys([*hit, *(c for p in hit for c in p.walk())]))
        heads = self._shorten(lost)
        gone = self._take(lost)
        self.doing = self.log
        self.store.quarantine({bad: "a test says so"}, gone, [], heads)
        self.store.flush()

    def checkpoint(self) -> None:
        self.doing = self.log
        before = self.recorder.index_files()
        self.store._jobs.put(self.store.index.checkpoint)
        self.store.flush()
        self.recorder.folded(before)

    OPERATIONS = (
        ("speak", 10), ("fork", 2), ("policy", 1), ("forget", 1), ("evict", 1), ("compact", 2), ("quarantine", 1),
        ("checkpoint", 1),
    )  # fmt: skip

    def step(self) -> str:
        names, weights = zip(*self.OPERATIONS, strict=True)
        (name,) = self.rng.choices(names, weights)
        getattr(self, name)()
        return str(name)

    def close(self) -> None:
        self.store.close()


def replayed(turns: list[TurnRow]) -> np.ndarray:
    ids = np.zeros(0, np.int32)
    for turn in turns:
        ids = np.concatenate([ids[: turn.keep_tokens], turn.ids])
    return ids


def noted(agent: AgentRow, turns: list[TurnRow]) -> str:
    """Everything about an agent that must not be lost, as text."""
    told = [
        [t.n, t.keep_tokens, t.keep_messages, t.ids.tolist(), t.spans, t.messages, t.stats] for t in turns
    ]
    return json.dumps([agent.namespace, agent.totals, agent.policy, agent.lineage, told])


def check_store(folder: Path, allowed: list[Log]) -> None:
    """The three promises, on a folder as a power cut left it. `allowed`: the logs that may be found."""
    store = Store(folder, FINGERPRINT, durable=False)
    try:
        names = {a.id: a for a in store.index.agents()}
        found = {names[s.agent].name: noted(names[s.agent], s.turns) for s in store.index.sessions()}
        assert found in allowed, "what was acknowledged is not there"
        assert store.salvage is None, store.salvage
        _check_pages(store)
        on_disk = {p.name for p in (folder / "extents").iterdir()}
        assert on_disk == set(store.names.values()), "files that nobody knows, or that are missing"
        assert store.quarantined == 0
    finally:
        store.close()


def _check_pages(store: Store) -> None:
    """Every page that is offered has the rows that belong to its tokens."""
    tree = PageTree(FINGERPRINT, SPACE)
    pages: dict[int, Page] = {}
    wanted, slot = [], 0
    for id_, parent, raw, tokens, pieces in store.index.pages(SPACE):
        page = tree.add(pages[parent] if parent is not None else tree.root, tokens, raw=raw)
        pages[id_], page.pieces = page, pieces
        assert sum(p.rows for p in pieces) == page.rows
        n = G.slots_for(raw, page.rows)
        wanted.append((page, tuple(range(slot, slot + n))))
        slot += n
    heads = [s.head for s in store.index.sessions()]
    assert all(h is None or h in pages for h in heads)
    view = np.zeros((slot, G.slot_words[0]), np.uint32)
    read = store._reader.read(RestorePlan(G, wanted), store.names, [view])
    assert not read.bad, read.bad
    for page, slots in wanted:
        if page.raw:
            per, words = G.raw_per_slot, G.raw_words[0]
            rows = np.concatenate([view[s, : per * words].reshape(per, words) for s in slots])[: page.rows]
        else:
            rows = view.reshape(-1, G.packed_words[0])[slots[0] * PAGE : slots[0] * PAGE + page.rows]
        assert np.array_equal(rows, rows_of(page, 0, page.rows)), "rows of other tokens"
