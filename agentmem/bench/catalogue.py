"""A home with very many pages: lookup, fork, and opening after a crash."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.index import AgentRow, ExtentRow, SessionRow, TurnCommit, TurnRow
from agentmem.blockpool.page import Page, PageTree, Piece
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.engine.conversation import Tokenizer
from agentmem.engine.memory import Memory
from agentmem.quant.format import LayerShape, kv_format
from agentmem.quant.rows import RowCodec

PAGE = 64
LONG = 131072
FINGERPRINT = "catalogue"


def small_geometry() -> Geometry:
    """One narrow layer: nothing here depends on what a row takes."""
    shape = LayerShape(1, 64, 64)
    return Geometry((RowCodec(shape, kv_format("q4-plain").for_shape(shape), mx.float16),), PAGE)


def _write(folder: Path, pages: int, agents: int, say: Callable[[str], None]) -> Path:
    """A store with `pages` pages of `agents` agents, one of which has LONG tokens; returns a copy of it as a crash leaves it."""
    store = Store(folder, FINGERPRINT, durable=False)
    rng = np.random.default_rng(0)
    long_pages = min(LONG // PAGE, pages // 2)
    lengths = [long_pages] + [(pages - long_pages) // (agents - 1)] * (agents - 1)
    ids = 0
    for number, length in enumerate(lengths, start=1):
        tree, head = PageTree(FINGERPRINT, "default"), None
        rows: list[tuple[Page, tuple[Piece, ...]]] = []
        for _ in range(length):
            ids += 1
            head = tree.add(head or tree.root, rng.integers(0, 50000, PAGE), raw=False)
            head.id = ids
            rows.append((head, (Piece(number, False, PAGE * len(rows), 0, PAGE),)))
        extent = ExtentRow(number, f"{number:064x}.safetensors", length)
        (store.extents / extent.name).touch(mode=0o600)
        agent = AgentRow(number, "default", f"agent-{number}", 0.0, float(number), {})
        tokens = np.concatenate([p.tokens for p, _ in rows])
        turn = TurnRow(1, 0, 0, tokens, [["prompt", len(tokens), None]], [], {}, float(number))
        session = SessionRow(number, number, "default", None)
        store.index.commit(TurnCommit(agent, session, turn, head, rows, [], extent))
    say(f"{ids} pages of {agents} agents written")
    crashed = folder.with_name(folder.name + "-crashed")
    shutil.copytree(folder, crashed)
    store.close()
    return crashed


def _median_ms(repeats: int, action: Callable[[], Any]) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(
    folder: Path, tokenizer: Tokenizer, pages: int, agents: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Milliseconds, medians; `open_s` is the index and the trees after a crash, in seconds."""
    crashed = _write(folder, pages, agents, say)
    geometry = small_geometry()
    start = time.perf_counter()
    store = Store(crashed, FINGERPRINT)
    pool = Pool(geometry, 64 * geometry.slot_bytes, FINGERPRINT)
    memory = Memory(store, pool, tokenizer)
    memory.load()
    opened = time.perf_counter() - start
    say(f"opened after a crash in {opened:.2f} s")
    loaded = sum(1 for t in pool.trees() for _ in t.pages())
    out: dict[str, Any] = {"pages": loaded, "agents": len(memory.agents()), "open_s": opened}
    stranger = memory.open("default", "stranger", "default")
    for name, owner, length in (("4k", agents // 2, 4096), ("128k", 1, LONG)):
        agent = memory.find("default", f"agent-{owner}")
        session = agent.sessions["default"]
        text = np.concatenate([session.row.turns[0].ids, np.zeros(length, np.int32)])[:length].tolist()
        lookups = [partial(memory.match, *who, text) for who in ((agent, session), stranger)]
        out[f"lookup_{name}_ms"] = max(_median_ms(20, lookup) for lookup in lookups)
    names = iter(range(1000))
    parent = memory.find("default", "agent-1")

    def fork() -> None:
        done: list[Exception | None] = []
        memory.fork(
            parent, parent.sessions["default"], f"fork-{next(names)}", None, lambda _, e: done.append(e)
        )
        while not done:
            store.completions.get(timeout=60)()
        assert done == [None]

    out["fork_ms"] = _median_ms(20, fork)
    store.close()
    return out
