"""Bandwidth of putting and restoring many pages against raw writes and reads of the same bytes, in one run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.blockpool.extent import write_extent
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.index import ExtentRow, TurnRow
from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.blockpool.store import Store
from agentmem.engine.commit_rows import CommitRows
from agentmem.engine.conversation import Tokenizer
from agentmem.engine.memory import Memory
from agentmem.engine.recall import Recall

READ = 1 << 20
WRITE = 64 << 20


def drain(pool: Pool, store: Store, until: Callable[[], bool]) -> None:
    """What the engine does between steps, until `until` holds."""
    while not until():
        while pool.arena.advance():
            pass
        store.completions.get(timeout=120)()


def fill(pool: Pool, memory: Memory, pages: int) -> Page:
    """A chain of `pages` packed pages with random contents, committed as one turn."""
    g, head = pool.geometry, pool.tree("bench").root
    rng = np.random.default_rng(0)
    for _ in range(pages):
        slots = pool.take(1)
        rows = [
            mx.array(rng.integers(0, 1 << 32, (g.page_tokens, w), dtype=np.uint32)) for w in g.packed_words
        ]
        mx.eval(rows)
        pool.arena.write_packed(slots, rows)
        page = pool.tree("bench").add(head, rng.integers(0, 1000, g.page_tokens), raw=False)
        pool.settle(page, slots)
        head = page
    agent, session = memory.open("bench", "bench", "default")
    turn = TurnRow(1, 0, 0, np.zeros(0, np.int32), [], [], {}, 0.0)
    memory.finish(agent, session, turn, head, lambda *_: None)
    return head


def _pread(path: Path, threads: int) -> float:
    """Seconds of a parallel read of the whole file into memory that is there already."""
    size = path.stat().st_size
    target = np.zeros(size, np.uint8)
    fd = os.open(path, os.O_RDONLY)
    part = -(-size // threads)

    def read(first: int) -> None:
        view = memoryview(target)
        for at in range(first, min(first + part, size), READ):
            os.preadv(fd, [view[at : min(at + READ, first + part, size)]], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))
        start = time.perf_counter()
        list(pool.map(read, range(0, size, part)))
        seconds = time.perf_counter() - start
    os.close(fd)
    return seconds


def _put(pool: Pool, store: Store, chain: list[Page], scratch: Path) -> float:
    """Seconds of writing the rows of `chain` as a commit does: collected, summed, written, synced, renamed."""
    start = time.perf_counter()
    data = CommitRows(pool, chain, ExtentRow(0, "", 0)).data("bench", {})
    assert data is not None
    name, _ = write_extent(scratch, data(), store.files)
    seconds = time.perf_counter() - start
    (scratch / name).unlink()
    return seconds


def _pwrite(path: Path, scratch: Path) -> float:
    """Seconds of writing the bytes of `path`, which are in memory, to a file of its own, and syncing it."""
    content = memoryview(path.read_bytes())
    target = scratch / "raw"
    start = time.perf_counter()
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    for at in range(0, len(content), WRITE):
        os.pwrite(fd, content[at : at + WRITE], at)
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def _mx_load(path: Path) -> float:
    start = time.perf_counter()
    arrays: Any = mx.load(str(path))
    mx.eval(list(arrays.values()))
    return time.perf_counter() - start


def _restore(pool: Pool, recall: Recall, store: Store, chain: list[Page]) -> float:
    """Seconds until every page of `chain` is back in RAM."""
    done: list[float] = []
    start = time.perf_counter()
    recall.start(chain, lambda _, seconds: done.append(seconds))
    drain(pool, store, lambda: bool(done))
    return time.perf_counter() - start


def measure(
    geometry: Geometry, tokenizer: Tokenizer, folder: Path, megabytes: int, repeats: int
) -> dict[str, Any]:
    """Medians of `repeats` rounds, each of which restores, preads and loads the same file; GB/s of 10^9 bytes."""
    pages = max(2, (megabytes << 20) // geometry.slot_bytes)
    pool = Pool(geometry, (pages + 8) * geometry.slot_bytes, "bench")
    store = Store(folder, "bench")
    memory = Memory(store, pool, tokenizer)
    memory.load()
    recall = Recall(pool, store)
    threads = min(16, os.cpu_count() or 2)
    head = fill(pool, memory, pages)
    drain(pool, store, lambda: memory.unwritten == 0)
    chain = head.chain()
    path = next(store.extents.iterdir())
    times: dict[str, list[float]] = {name: [] for name in ("put", "pwrite", "restore", "pread", "mx_load")}
    scratch = folder / "scratch"
    scratch.mkdir()
    for _ in range(repeats):
        times["put"].append(_put(pool, store, chain, scratch))
        times["pwrite"].append(_pwrite(path, scratch))
        for page in chain:
            pool.evict(page)
        times["restore"].append(_restore(pool, recall, store, chain))
        times["pread"].append(_pread(path, threads))
        times["mx_load"].append(_mx_load(path))
    size = path.stat().st_size
    store.close()
    speed = {name: size / statistics.median(t) / 1e9 for name, t in times.items()}
    return {
        "bytes": size,
        **{f"{name}_gb_s": s for name, s in speed.items()},
        "put_over_pwrite": speed["put"] / speed["pwrite"],
        "restore_over_pread": speed["restore"] / speed["pread"],
        "restore_over_mx_load": speed["restore"] / speed["mx_load"],
        "threads": threads,
    }
