"""The library on disk: bit for bit after a restart, whole after a kill, and nothing of it used that is damaged."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from agentmem.blockpool.keep import Keep
from agentmem.blockpool.keepsake import Array
from agentmem.compose import frozen
from agentmem.compose.composer import Composer, Span
from agentmem.compose.keeping import Keeping
from agentmem.compose.ledger import Ledger, Pair
from agentmem.compose.library import Library
from agentmem.compose.packed import PackedState
from agentmem.compose.planners import Put
from agentmem.compose.policy import Policy
from agentmem.compose.segment import Fixed, Segment
from tests.compose.prompts import Stage, stage
from tests.compose.rounds import ROOM, Round
from tests.compose.test_composer import QUESTIONS, chain
from tests.compose.test_offsets import drawn

pytestmark = pytest.mark.slow


def keeping(
    folder: Path, library: Library | None = None, ledger: Ledger | None = None, budget: int = ROOM
) -> Keeping:
    return Keeping(library or Library(ROOM, ROOM), ledger or Ledger(), Keep(folder, "tiny", budget))


def same(a: PackedState, b: PackedState) -> bool:
    parts = [(getattr(a, part), getattr(b, part)) for part in frozen.PARTS]
    return (a.bits, a.shapes) == (b.bits, b.shapes) and all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in parts
    )


def contents(library: Library) -> dict[str, object]:
    """Everything that a library holds, comparable: the marks are of every bit of a base."""
    out: dict[str, object] = {}
    for namespace, space in library.spaces.items():
        for text, s in space.segments.items():
            said = (s.mark, s.ids.tolist(), s.kind, s.provenance, s.home, s.owners, s.hits, s.used, s.created)
            out[f"{namespace} {text.hex()}"] = said
        for key, f in space.fixed.items():
            out[f"{namespace} fixed {key.hex()}"] = (f.mark, f.ids.tolist(), f.owners, f.hits, f.used)
        out[f"{namespace} documents"] = {d.name: d.ids.tolist() for d in space.documents.values()}
        out[f"{namespace} templates"] = dict(space.templates)
    return out


@pytest.fixture(scope="module")
def world() -> Stage:
    return stage(layers=3)


@pytest.fixture(scope="module")
def taught(world: Stage) -> Round:
    rounds = Round(world)
    for question in QUESTIONS[:4]:
        chain(rounds, question)
    rounds.library.register("home", "spec", world.ids(QUESTIONS[0]))
    rounds.library.declare("home", "ask", "Asked: {{question}}\nAnswer.")
    return rounds


def test_what_is_saved_and_loaded_is_reused_bit_for_bit(taught: Round, world: Stage, tmp_path: Path) -> None:
    """Invariant 23."""
    library, ledger = taught.library, taught.composer.ledger
    ((home, template), *_) = ledger.entries
    ledger.calibrate(home, template, "kvcomm+tail", [Pair(0.01, 0.02, 1.0)] * 20)
    before = keeping(tmp_path, library, ledger)
    before.flush(everything=True)
    assert before.keep.problem is None
    after = keeping(tmp_path)
    after.restore()
    assert contents(after.library) == contents(library)
    assert after.ledger.entries == ledger.entries
    pairs = list(zip(library.pool.items(), after.library.pool.items(), strict=True))
    assert len(pairs) > 4
    for (slot, old), (other, new) in pairs:
        assert (slot, old.text, old.hits) == (other, new.text, new.hits)
        assert same(old.base, new.base)
        for consumer in old.offsets:
            assert all(same(a, b) for a, b in zip(old.offsets[consumer], new.offsets[consumer], strict=True))
    assert after.library.sources == library.sources
    after.library.check_integrity()

    ids = world.ids(f"#Question: {QUESTIONS[0]}\nDraft: {QUESTIONS[1]}\nIs it right?#")
    plans = [
        Composer(lib).plan("home", ids, [Span(1, len(ids) - 1, "user")], 0, Policy("composed", "lego"))
        for lib in (library, after.library)
    ]
    assert plans[0] is not None
    assert plans[1] is not None
    for one, two in zip(plans[0].steps, plans[1].steps, strict=True):
        assert one.ids == two.ids
        if isinstance(one, Put):
            assert isinstance(two, Put)
            assert np.array_equal(np.asarray(one.state.rows), np.asarray(two.state.rows))


@pytest.mark.parametrize("dtype", [mx.uint32, mx.float16, mx.bfloat16, mx.float32])
def test_arrays_of_every_type_come_back(dtype: mx.Dtype) -> None:
    for shape in ((3, 5), (0, 5), (1,)):
        x = (mx.random.normal(shape) * 1000).astype(dtype)
        kept = frozen.frozen(x)
        again = frozen.thawed(Array(kept.dtype, kept.shape, kept.data))
        assert (again.dtype, again.shape) == (x.dtype, x.shape)
        assert bool((again.view(mx.uint8) == x.view(mx.uint8)).all()) or not x.size


def test_only_what_changed_is_written(taught: Round, tmp_path: Path) -> None:
    kept = keeping(tmp_path, taught.library, taught.composer.ledger)
    kept.flush()
    files = sorted(os.listdir(kept.keep.items))
    kept.flush(everything=True)
    kept.flush()
    assert sorted(os.listdir(kept.keep.items)) == files
    assert all(stat.S_IMODE((kept.keep.items / f).stat().st_mode) == 0o600 for f in files)
    assert stat.S_IMODE(kept.keep.items.stat().st_mode) == 0o700


def test_what_is_forgotten_leaves_the_disk(world: Stage, tmp_path: Path) -> None:
    rounds = Round(world)
    for question in QUESTIONS[:2]:
        chain(rounds, question)
    kept = keeping(tmp_path, rounds.library, rounds.composer.ledger)
    kept.flush()
    rounds.composer.forget("home", "judge")
    kept.flush()
    again = keeping(tmp_path)
    again.restore()
    owners = [s.owners for s in again.library.space("home").segments.values()]
    assert owners
    assert all("judge" not in o for o in owners)
    assert again.library.sources == rounds.library.sources
    assert {who for s in again.library.sources.values() for who in s.seen_by} == {"analyst"}
    rounds.composer.forget("home")
    kept.flush()
    assert os.listdir(kept.keep.items) == []
    assert kept.keep.notes() == {}


def filled(folder: Path, count: int = 6) -> Keeping:
    """A library of drawn states on disk."""
    library = Library(ROOM, ROOM)
    for n in range(count):
        library.put("home", Segment(np.arange(n, n + 20), PackedState.of(drawn(20, n), 8)), "a")
    library.put_fixed("home", b"k" * 16, Fixed(np.arange(3), PackedState.of(drawn(3, 90), 8)), "a")
    segment = next(iter(library.space("home").segments.values()))
    text = segment.piece_text(0, 20)
    library.observe("home", b"k" * 16, segment, text, drawn(20, 0), drawn(20, 91), drawn(3, 92), "a", {"a"})
    kept = keeping(folder, library)
    kept.flush()
    return kept


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone", "link", "swap", "folder"])
def test_damaged_files_are_put_aside_and_never_used(tmp_path: Path, how: str) -> None:
    kept = filled(tmp_path)
    before = contents(kept.library)
    victims = [k for k in kept.keep.kept() if k.key.startswith(("segment/", "anchor/"))]
    for victim in victims:
        path = kept.keep.items / victim.name
        data = bytearray(path.read_bytes())
        match how:
            case "flip":
                data[hash(victim.name) % len(data)] ^= 16
                path.write_bytes(data)
            case "cut":
                path.write_bytes(data[: len(data) // 2])
            case "empty":
                path.write_bytes(b"")
            case "gone":
                path.unlink()
            case "link":
                path.rename(tmp_path / "elsewhere")
                path.symlink_to(tmp_path / "elsewhere")
            case "swap":
                path.write_bytes(
                    (kept.keep.items / victims[0].name).read_bytes() if victim is not victims[0] else b"x"
                )
            case "folder":
                path.unlink()
                path.mkdir()
    again = keeping(tmp_path)
    again.restore()
    assert again.library.space("home").segments == {}
    assert len(again.library.pool) == 0
    assert len(again.library.space("home").fixed) == 1, "what is whole stays"
    again.library.check_integrity()
    assert again.keep.problem is None
    for segment in kept.library.space("home").segments.values():
        again.library.put("home", segment, "a")
    again.flush()
    third = keeping(tmp_path)
    third.restore()
    assert {k: v for k, v in contents(third.library).items() if "fixed" not in k}.keys() <= before.keys()
    assert len(third.library.space("home").segments) == len(kept.library.space("home").segments)


@pytest.mark.parametrize("at", [0, 20, 100, 5000])
def test_a_damaged_index_is_begun_anew(tmp_path: Path, at: int) -> None:
    kept = filled(tmp_path)
    kept.keep.close()
    index = tmp_path / "keep.sqlite"
    data = bytearray(index.read_bytes())
    data[at : at + 64] = os.urandom(64)
    index.write_bytes(data)
    again = keeping(tmp_path)
    again.restore()
    whole = contents(kept.library)
    assert all(whole[k] == v for k, v in contents(again.library).items())
    again.library.put("home", Segment(np.arange(30), PackedState.of(drawn(30, 7), 8)), "a")
    again.flush()
    assert again.keep.problem is None


def test_another_model_s_state_is_invisible(tmp_path: Path) -> None:
    filled(tmp_path).keep.close()
    other = Keeping(Library(ROOM, ROOM), Ledger(), Keep(tmp_path, "another", ROOM))
    other.restore()
    assert len(other.library.spaces) == 0
    assert os.listdir(other.keep.items) == []


def test_smaller_budgets_than_before_hold(tmp_path: Path) -> None:
    kept = filled(tmp_path)
    one = next(iter(kept.library.space("home").segments.values())).nbytes
    kept.keep.close()
    again = Keeping(Library(3 * one, 10), Ledger(), Keep(tmp_path, "tiny", ROOM))
    again.restore()
    again.library.check_integrity()
    assert 0 < len(again.library.space("home").segments) <= 3
    assert len(again.keep.kept()) == len(again.library.space("home").segments) + len(
        again.library.space("home").fixed
    )


LIFE = """
import sys, numpy as np
from pathlib import Path
from tests.compose.test_keeping import filled, keeping, drawn, Segment, PackedState
from agentmem.blockpool.failpoint import arm
folder = Path(sys.argv[1])
kept = keeping(folder)
kept.restore()
arm(sys.argv[2])
for n in range(10, 14):
    kept.library.put("home", Segment(np.arange(n, n + 20), PackedState.of(drawn(20, n), 8)), "b")
    kept.flush()
kept.library.forget("home", "a")
kept.flush()
"""


@pytest.mark.parametrize("point", ["file.synced", "index.changed", "unlink.begin"])
def test_a_kill_in_mid_write_leaves_the_library_whole(tmp_path: Path, point: str) -> None:
    """What is there afterwards is what one of the flushes left, bit for bit, and no file is there that nobody knows."""
    whole = contents(filled(tmp_path / "1").library)
    filled(tmp_path / "3")
    for n in range(10, 14):
        segment = Segment(np.arange(n, n + 20), PackedState.of(drawn(20, n), 8))
        whole[f"home {segment.text.hex()}"] = segment.mark
    for n in (1, 3):
        done = subprocess.run(
            [sys.executable, "-c", LIFE, str(tmp_path / str(n)), f"{point}:{n}"],
            check=False,
            timeout=120,
            capture_output=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        again = keeping(tmp_path / str(n))
        again.restore()
        again.library.check_integrity()
        assert again.keep.damaged == 0
        for key, found in contents(again.library).items():
            if isinstance(found, tuple):
                wanted = whole[key]
                assert found[0] == (wanted[0] if isinstance(wanted, tuple) else wanted)
        assert len(os.listdir(again.keep.items)) == len(again.keep.kept()) == len(dict(again._live()))
        again.keep.close()


def test_a_disk_that_fails_ends_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = filled(tmp_path, count=2)

    def fail(*_: object) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr(os, "fsync", fail)
    kept.library.put("home", Segment(np.arange(30), PackedState.of(drawn(30, 7), 8)), "a")
    kept.flush()
    assert kept.keep.problem is not None
    monkeypatch.undo()
    again = keeping(tmp_path)
    again.restore()
    assert len(again.library.space("home").segments) == 2
