"""Power cuts as a state machine: operations in any order; states that a cut can leave are looked at, and lives go on from some.

Hypothesis chooses the operations and shortens a sequence that fails.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import agentmem.blockpool.index as index_module
from tests.crash.clones import Clone, Moment, Recorder, clones
from tests.crash.test_clones import MEMORY, FolderNeverSynced
from tests.crash.world import Log, World, check_store

randoms = st.randoms(use_true_random=True)


class PowerCuts(RuleBasedStateMachine):
    """The model is `World.log`, what was acknowledged. After every operation the clones of its moments are opened and checked.

    `most`: clones of a moment. `kind`: how faithful the files are.
    """

    most = 2
    kind: type[Recorder] = Recorder
    checked = 0
    lives = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.patch = pytest.MonkeyPatch()
        self.moments: list[Moment] = []
        self.allowed: list[Log] = [{}, {}]
        self.rng = random.Random(0)
        self.homes = 0
        self.home = self.folder / "home"

    @initialize(rng=randoms)
    def begin(self, rng: random.Random) -> None:
        self.rng = rng
        self.home.mkdir()
        self.live()

    def live(self) -> None:
        """Open the home."""
        self.recorder = self.kind(self.home)
        self.patch.setattr(index_module, "failpoint", self.recorder.transaction)
        self.world = World(self.home, self.recorder, self.rng)
        self.world.store.index.db.execute("pragma wal_autocheckpoint=40")

    def act(self, name: str, rng: random.Random) -> None:
        self.rng = self.world.rng = rng
        before = self.world.log
        getattr(self.world, name)()
        self.moments, self.recorder.moments = self.recorder.moments, []
        self.allowed = [before, self.world.log]

    @rule(rng=randoms)
    def speak(self, rng: random.Random) -> None:
        self.act("speak", rng)

    @precondition(lambda self: self.world.speakers)
    @rule(rng=randoms)
    def fork(self, rng: random.Random) -> None:
        self.act("fork", rng)

    @precondition(lambda self: self.world.speakers)
    @rule(rng=randoms)
    def policy(self, rng: random.Random) -> None:
        self.act("policy", rng)

    @precondition(lambda self: self.world.speakers)
    @rule(rng=randoms)
    def forget(self, rng: random.Random) -> None:
        self.act("forget", rng)

    @rule(rng=randoms)
    def evict(self, rng: random.Random) -> None:
        self.act("evict", rng)

    @rule(rng=randoms)
    def compact(self, rng: random.Random) -> None:
        self.act("compact", rng)

    @rule(rng=randoms)
    def quarantine(self, rng: random.Random) -> None:
        self.act("quarantine", rng)

    @rule(rng=randoms)
    def checkpoint(self, rng: random.Random) -> None:
        self.act("checkpoint", rng)

    @precondition(lambda self: self.moments)
    @rule(rng=randoms)
    def cut_and_go_on(self, rng: random.Random) -> None:
        """The power went during the last operation; the next life finds what is left, and is cut itself while it starts."""
        clone = rng.choice(list(clones(rng.choice(self.moments), rng, most=8)))
        before = self.allowed
        self.world.close()
        self.homes += 1
        self.home = self.folder / f"home-{self.homes}"
        clone.write(self.home)
        self.rng = rng
        self.live()
        assert self.world.log in before, "what was acknowledged is not there"
        self.moments, self.recorder.moments = self.recorder.moments, []
        self.allowed = [self.world.log]
        type(self).lives += 1

    @invariant()
    def every_cut_keeps_the_promises(self) -> None:
        self.patch.setattr(index_module, "failpoint", lambda _: None)
        for moment in self.moments:
            for clone in clones(moment, self.rng, self.most):
                self.look(clone)
        if hasattr(self, "recorder"):
            self.patch.setattr(index_module, "failpoint", self.recorder.transaction)

    def look(self, clone: Clone) -> None:
        folder = self.folder / "clone"
        clone.write(folder)
        try:
            check_store(folder, self.allowed)
        finally:
            shutil.rmtree(folder)
        type(self).checked += 1

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
        self.patch.undo()
        shutil.rmtree(self.folder)


class CarelessPowerCuts(PowerCuts):
    kind = FolderNeverSynced


def run(machine: type[PowerCuts], examples: int, steps: int, **options: Any) -> None:
    machine.checked = machine.lives = 0
    profile = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), **options,
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=profile)


def test_a_few_lives_with_power_cuts() -> None:
    run(PowerCuts, examples=2, steps=8)
    assert PowerCuts.checked > 40


@pytest.mark.slow(minutes=0.5)
def test_many_lives_with_power_cuts() -> None:
    run(PowerCuts, examples=16, steps=30)
    print(f"{PowerCuts.checked} states after a power cut, {PowerCuts.lives} lives that went on from one")
    assert PowerCuts.checked > 1200
    assert PowerCuts.lives > 12


def test_the_machine_finds_a_store_that_forgets_to_sync() -> None:
    with pytest.raises(AssertionError, match=r"not there|nobody knows|FileNotFound"):
        run(
            CarelessPowerCuts,
            examples=20,
            steps=8,
            phases=[Phase.explicit, Phase.generate],
            report_multiple_bugs=False,
        )
