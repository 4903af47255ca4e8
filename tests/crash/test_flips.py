"""One flipped bit, anywhere: the daemon starts, every turn is there, and nobody gets a different answer."""

from __future__ import annotations

import gc
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.crash.home import Expected, ask_all, copy_of
from tests.runtime.agents import extents, quarantined

KINDS = ("extent header", "extent payload", "index", "log")


def flip(home: Path, kind: str, rng: random.Random) -> str:
    """Flip one bit of that kind; says which."""
    names = {"index": "index.sqlite", "log": "index.sqlite-wal"}
    path = home / "store" / names[kind] if kind in names else rng.choice(extents(home))
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    first, last = {
        "index": (0, len(content)),
        "log": (0, len(content)),
        "extent header": (0, header),
        "extent payload": (header, len(content)),
    }[kind]
    at, bit = rng.randrange(first, last), rng.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name} byte {at} bit {bit}"


def outcome(home: Path, expected: Expected) -> str:
    """What the flip led to: "quarantined" when something was put aside, else "harmless" or "read anew"."""
    found = ask_all(home)
    assert found.replies == expected.replies
    assert found.prompts == expected.prompts
    if quarantined(home):
        return "quarantined"
    return "harmless" if found.cached == expected.cached else "read anew"


class Homes:
    """Homes to damage, and what their agents must say."""

    def __init__(self, original: Path, crashed: Path, expected: Expected, folder: Path) -> None:
        self.original, self.crashed, self.expected = original, crashed, expected
        self.folder = folder

    def flip(self, times: int, seed: int) -> dict[str, Counter[str]]:
        """Outcomes by kind of `times` flips, each on a fresh copy; those of the log on what a killed process left."""
        rng = random.Random(seed)
        outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for n in range(times):
            if n % 20 == 19:  # a runtime's pages are kept from the collector; hundreds would fill the memory
                gc.unfreeze()
                gc.collect()
            kind = KINDS[n % len(KINDS)]
            home = copy_of(self.crashed if kind == "log" else self.original, self.folder / "home")
            where = flip(home, kind, rng)
            try:
                outcomes[kind][outcome(home, self.expected)] += 1
            except Exception as e:
                raise AssertionError(f"seed {seed}, {kind}, {where}: {e}") from e
        return outcomes


@pytest.fixture
def homes(original: Path, crashed: Path, expected: Expected, tmp_path: Path) -> Homes:
    return Homes(original, crashed, expected, tmp_path)


def test_flipped_bits_change_no_answer(homes: Homes) -> None:
    outcomes = homes.flip(times=12, seed=1)
    assert outcomes["extent header"] == Counter({"quarantined": 3})
    assert outcomes["extent payload"]["quarantined"] > 0


@pytest.mark.slow(minutes=4)
def test_a_thousand_flipped_bits_change_no_answer(homes: Homes) -> None:
    outcomes = homes.flip(times=1000, seed=2)
    print({kind: dict(counts) for kind, counts in outcomes.items()})
    assert sum(sum(counts.values()) for counts in outcomes.values()) == 1000
    for counts in outcomes.values():
        assert set(counts) <= {"quarantined", "harmless"}
        assert counts["quarantined"] > 0
