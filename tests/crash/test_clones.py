"""Power cuts: whatever a drive had not yet been made to keep, the store starts, knows every acknowledged turn, and offers no
wrong row."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import agentmem.blockpool.index as index_module
from tests.crash.clones import Moment, Recorder, clones
from tests.crash.world import Log, World, check_store

MEMORY = Path("/dev/shm")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory where the system has one: thousands of clones come and go in it."""
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


class Explorer:
    """Runs operations on homes of its own and looks at clones. `kinds` counts the different ones by what was under way."""

    def __init__(self, scratch: Path, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.scratch, self.seed, self.patch = scratch, seed, patch
        self.rng = random.Random(seed)
        self.seen: set[bytes] = set()
        self.kinds: Counter[str] = Counter()

    def explore(self, wanted: int, recorder: type[Recorder] = Recorder) -> int:
        """Until `wanted` different clones were seen; returns how many there were."""
        while len(self.seen) < wanted:
            home = self.scratch / "home"
            home.mkdir()
            self._live(home, recorder(home), wanted)
            shutil.rmtree(home)
        return len(self.seen)

    def _live(self, home: Path, recorder: Recorder, wanted: int) -> None:
        self._hear(recorder.transaction)
        world = World(home, recorder, self.rng)
        world.store.index.db.execute("pragma wal_autocheckpoint=40")
        try:
            for _ in range(40):
                before = world.log
                name = world.step()
                moments, recorder.moments = recorder.moments, []
                self._hear(lambda _: None)
                self._look(name, moments, [before, world.log])
                self._hear(recorder.transaction)
                if len(self.seen) >= wanted:
                    return
        finally:
            world.close()

    def _hear(self, point: Callable[[str], None]) -> None:
        """Who hears of the beginnings and ends of transactions."""
        self.patch.setattr(index_module, "failpoint", point)

    def _look(self, name: str, moments: list[Moment], allowed: list[Log]) -> None:
        folder = self.scratch / "clone"
        for clone in (c for m in moments for c in clones(m, self.rng, most=8)):
            if clone.digest in self.seen:
                continue
            self.seen.add(clone.digest)
            self.kinds[f"{name}, {clone.label}"] += 1
            clone.write(folder)
            try:
                check_store(folder, allowed)
            except Exception as e:
                raise AssertionError(
                    f"seed {self.seed}, clone {len(self.seen)}, {name}, {clone.label}: {e}"
                ) from e
            finally:
                shutil.rmtree(folder)


def test_two_hundred_power_cuts(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = Explorer(scratch, 1, monkeypatch)
    assert explorer.explore(200) >= 200
    assert {k.partition(",")[0] for k in explorer.kinds} >= {"speak", "fork", "compact"}


@pytest.mark.slow(minutes=2)
def test_ten_thousand_power_cuts(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = Explorer(scratch, 2, monkeypatch)
    explored = explorer.explore(10_000)
    print(f"{explored} states after a power cut:")
    for kind, n in sorted(explorer.kinds.items()):
        print(f"  {kind}: {n}")
    assert explored >= 10_000
    assert {k.partition(",")[0] for k in explorer.kinds} == {name for name, _ in World.OPERATIONS}


class NeverSynced(Recorder):
    """A store that forgets to sync its files: the content may be lost though the name is there."""

    def create(self, path: Path, buffers: Sequence[bytes | memoryview]) -> None:
        super().create(path, buffers)
        self.pending = (*self.pending[:-1], replace(self.pending[-1], synced=False))

    def rename(self, path: Path, target: Path) -> None:
        super().rename(path, target)
        self.pending = (*self.pending[:-1], replace(self.pending[-1], synced=False))

    def sync_folder(self, folder: Path) -> None:
        self._record("not synced")


class FolderNeverSynced(Recorder):
    """A store that forgets to sync its folders: the name may be lost."""

    def sync_folder(self, folder: Path) -> None:
        self._record("not synced")


@pytest.mark.parametrize("careless", [NeverSynced, FolderNeverSynced])
def test_a_store_that_forgets_to_sync_is_found_out(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, careless: type[Recorder]
) -> None:
    with pytest.raises(AssertionError, match="speak"):
        Explorer(scratch, 3, monkeypatch).explore(300, careless)
