"""What tests do to a store, as the engine thread does it."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agentmem.blockpool.page import Page
from agentmem.blockpool.restore import RestorePlan
from agentmem.blockpool.rows import TurnCommit
from agentmem.blockpool.store import Store
from tests.blockpool.layout import PAGE, extent_data, geometry

FINGERPRINT = "fingerprint"


def outcome(store: Store, submit: Callable[[Callable[..., None]], None]) -> tuple[Any, ...]:
    """Submit a job and run its completion, as the engine thread does."""
    got: list[tuple[Any, ...]] = []
    submit(lambda *result: got.append(result))
    while not got:
        store.completions.get(timeout=30)()
    return got[0]


def commit(store: Store, turn: TurnCommit, seed: int = 0) -> tuple[int | None, Exception | None]:
    rows = (lambda: extent_data(geometry(), 0, PAGE, seed)) if turn.extent else None
    written, error = outcome(store, lambda done: store.commit(turn, rows, done))
    return written, error


def restore(store: Store, turn: TurnCommit) -> tuple[list[np.ndarray], dict[int, str]]:
    page, pieces = turn.pages[0]
    wanted = Page(None, page.tokens, b"", True, pieces=pieces)
    g = geometry()
    views = [np.zeros((4, w), np.uint32) for w in g.slot_words]
    plan = RestorePlan(g, [(wanted, (0, 1, 2, 3))])
    read = outcome(store, lambda done: store.restore(plan, views, done))[0]
    return views, read.bad


def flush(store: Store) -> None:
    """Wait until the writer has done what it was given before."""
    done: queue.Queue[None] = queue.Queue()
    store._jobs.put(lambda: done.put(None))
    done.get(timeout=30)


def tokens(seed: int = 0) -> list[int]:
    return list(range(seed, seed + PAGE))


def extents(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "extents"))
