"""A session of many turns, its extents merged in the background, against the same rows written at once.

The rows are random and no model runs; tables, commits, compaction and restores are the engine's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.bench.bandwidth import drain
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.index import TurnRow
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.engine.agents import Session
from agentmem.engine.conversation import Tokenizer
from agentmem.engine.memory import Agent, Memory
from agentmem.engine.recall import Recall
from agentmem.engine.table import Table
from agentmem.quant.attention import reference_path

TURN_TOKENS = 60


class _Rows:
    """Rows of one layer, as a layer view gives them after a forward pass."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def raw_rows(self) -> mx.array:
        return mx.array(self._rows)


class Bench:
    """One store with one agent for each way of writing."""

    def __init__(self, folder: Path, geometry: Geometry, tokenizer: Tokenizer, tokens: int) -> None:
        self.pool = Pool(geometry, 2 * geometry.worst_slots(tokens) * geometry.slot_bytes, "bench")
        self.store = Store(folder, "bench", durable=False)
        self.memory = Memory(self.store, self.pool, tokenizer)
        self.memory.load()
        self.recall = Recall(self.pool, self.store)
        # Every space has its own tree, so that the second agent does not find the pages of the first.
        self._who = {name: self.memory.open(name, name, "default") for name in ("many", "once")}

    def say(self, name: str, ids: np.ndarray, rows: list[np.ndarray]) -> int:
        """A turn that goes on with `ids`, whose rows follow those of the session; returns the bytes written."""
        agent, session = self._who[name]
        known = session.head.end if session.head is not None else 0
        table = Table(self.pool, reference_path)
        if session.head is not None:
            table.load(self.memory.match(agent, session, ids[:known].tolist()), known)
        views: Any = [_Rows(layer[known : len(ids)]) for layer in rows]
        arrays, apply = table.absorb(views, ids[known:].tolist())
        mx.eval(arrays)
        apply()
        head = table.settle(self.pool.tree(agent.row.space).root)
        n = len(session.row.turns) + 1
        turn = TurnRow(n, known, 0, ids[known:].astype(np.int32), [], [], {}, 0.0)
        written: list[int] = []
        self.memory.finish(agent, session, turn, head, lambda size, _: written.append(size))
        self._drain()
        return written[0]

    def _drain(self) -> None:
        drain(self.pool, self.store, lambda: not self.memory.unwritten)

    def restore_seconds(self, name: str) -> float:
        """From nothing in RAM until every page is back."""
        agent, _ = self._who[name]
        pages = agent.pages()
        for page in pages:
            self.pool.evict(page)
        done: list[float] = []
        start = time.perf_counter()
        self.recall.start(pages, lambda _, seconds: done.append(seconds))
        drain(self.pool, self.store, lambda: bool(done))
        return time.perf_counter() - start

    def extents(self, name: str) -> int:
        agent, _ = self._who[name]
        return len({x.extent for p in agent.pages() for x in p.pieces or ()})

    def who(self, name: str) -> tuple[Agent, Session]:
        return self._who[name]


def measure(
    folder: Path,
    geometry: Geometry,
    tokenizer: Tokenizer,
    turns: int,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Medians of `repeats` restores of each; `written_per_turn` is bytes over those of the turn's rows in 16 bits."""
    rng = np.random.default_rng(0)
    tokens = turns * TURN_TOKENS
    ids = rng.integers(0, 50000, tokens).astype(np.int32)
    rows = [_finite(rng, tokens, words) for words in geometry.raw_words]
    bench = Bench(folder, geometry, tokenizer, tokens)
    own = TURN_TOKENS * geometry.raw_row_bytes
    written = [bench.say("many", ids[: TURN_TOKENS * (n + 1)], rows) / own for n in range(turns)]
    bench.say("once", ids, rows)
    say(f"{turns} turns in {bench.extents('many')} extents after {bench.memory.journal.compactions} merges")
    seconds = {"many": list[float](), "once": list[float]()}
    for _ in range(repeats):
        for name, times in seconds.items():
            times.append(bench.restore_seconds(name))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "turns": turns,
        "tokens": tokens,
        "bytes_in_ram": sum(geometry.slots_for(p.raw, p.rows) for p in bench.who("many")[0].pages())
        * geometry.slot_bytes,
        "extents": bench.extents("many"),
        "merges": bench.memory.journal.compactions,
        "merged_bytes": bench.memory.journal.compacted_bytes,
        "restore_many_ms": 1e3 * median["many"],
        "restore_once_ms": 1e3 * median["once"],
        "many_over_once": median["once"] / median["many"],
        "written_per_turn": statistics.median(written),
    }
    bench.store.close()
    return result


def _finite(rng: np.random.Generator, rows: int, words: int) -> np.ndarray:
    """Raw rows of random float16 numbers, two to a word."""
    numbers = rng.standard_normal((rows, 2 * words), dtype=np.float32).astype(np.float16)
    return numbers.view(np.uint32)
