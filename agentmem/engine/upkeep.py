"""Upkeep: looking after what lies on disk while the engine serves."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from agentmem.blockpool.salvage import ask_for_rebuild
from agentmem.blockpool.scrub import Scrub
from agentmem.blockpool.store import Store
from agentmem.blockpool.verify import Verification, purge, verify
from agentmem.engine.engine import Engine
from agentmem.engine.memory import Memory

MB = 1e6


class Upkeep:
    """Verify, repair and scrub of a store in use. Methods may be called from any thread but the engine's."""

    def __init__(self, store: Store, memory: Memory, engine: Engine, scrub_mb_s: float) -> None:
        self._store, self._memory, self._engine = store, memory, engine
        store.scrub = Scrub(
            store.shelf,
            scrub_mb_s * MB,
            idle=lambda: not (engine.active or engine.waiting),
            found=lambda bad: engine.post(lambda: memory.lose(bad)),
        )
        store.scrub.start()

    def verify(self, *, deep: bool = False, rebuild: bool = False) -> dict[str, Any]:
        """Look everything over; see `blockpool.verify.verify`. Changes nothing.

        With `rebuild` the next start makes a new index from what it can read.
        """
        return self._told(self._verified(deep), rebuild)

    def repair(self, *, purge_quarantine: bool = False) -> dict[str, Any]:
        """Look over every byte; put damaged extents into the quarantine, so that their tokens are read anew.

        A damaged index is rebuilt by the next start. `purge_quarantine` empties the quarantine folder.
        """
        report = self._verified(True)
        ids = {name: extent for extent, name in self._store.names.items()}
        faults = report.bad | dict.fromkeys(report.missing, "its file is missing")
        bad = {ids[name]: reason for name, reason in faults.items() if name in ids}
        if bad:
            self._lose(bad)
        answer = self._told(report, bool(report.index))
        answer["quarantined"] = len(bad)
        if purge_quarantine:
            answer["purged_bytes"] = purge(self._store.folder)
            self._store.shelf.quarantine_bytes = 0
        return answer

    def _verified(self, deep: bool) -> Verification:
        return verify(self._store.folder, deep=deep)

    def _told(self, report: Verification, rebuild: bool) -> dict[str, Any]:
        if rebuild:
            ask_for_rebuild(self._store.folder)
        return {**report.as_json(), "rebuild": "at the next start" if rebuild else None}

    def _lose(self, bad: dict[int, str]) -> None:
        done: Future[None] = Future()

        def lose() -> None:
            try:
                self._memory.lose(bad)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        self._engine.post(lose)
        done.result()
        self._store.flush()
