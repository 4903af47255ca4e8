"""Looking a store over: is everything that it keeps as it was written? Changes nothing, and may run beside a daemon.

As a program it works on a store that no daemon holds: python -m agentmem.blockpool.verify FOLDER [--keys FOLDER] [--deep]
[--repair] [--rebuild] [--purge]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agentmem.blockpool.extent import SUFFIX, Extent, ExtentCorrupt, stripe_rows
from agentmem.blockpool.files import Files
from agentmem.blockpool.rows import page_sum, piece_sum, row_sum
from agentmem.blockpool.salvage import rebuild
from agentmem.blockpool.vault import Vaults

SETTLE_S = 0.5  # a running daemon knows an extent a moment after its file is there
_LOOSE = ("spaces", "agents", "sessions", "turns", "copies", "extents")


@dataclass(slots=True)
class Verification:
    """What was looked at, and what is wrong. `bytes` were read; `rows` of the index; `sealed` extents are checked as ciphertext.

    `bad`: {extent file: what is wrong with it}; `missing` and `orphans`: extents without a file, files without an extent.
    """

    deep: bool
    extents: int = 0
    bytes: int = 0
    rows: int = 0
    sealed: int = 0
    index: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. An orphan harms nobody: the next start removes it."""
        return not (self.index or self.bad or self.missing)

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(folder: Path, *, deep: bool) -> Verification:
    """Check the index (structure, references, every row), every extent's header and size, and with `deep` every byte of them
    and that their tokens are those of the index. Raises nothing for damage."""
    start, report = time.monotonic(), Verification(deep)
    tokens: dict[str, tuple[int, np.ndarray]] = {}
    try:
        on_disk = [n for n in os.listdir(folder / "extents") if n.endswith(SUFFIX)]
        with _reading(folder) as index:
            _check_index(index, report)
            known = _names(index)
        # Files are read outside of a transaction: an old reader would keep a daemon from folding its log.
        for name in known:
            _check_file(folder / "extents" / name, report, tokens)
        if deep:
            with _reading(folder) as index:
                _check_tokens(index, tokens, report)
        strangers = set(on_disk) - set(known)
        if strangers or report.missing:
            _look_again(folder, strangers, report)
    except (
        sqlite3.Error,
        ValueError,
        TypeError,
        struct.error,
    ) as e:  # columns of another kind than was written
        report.index.append(str(e))
    report.seconds = time.monotonic() - start
    return report


class _reading:
    """A connection that cannot write; it sees one state of the index from its first read on."""

    def __init__(self, folder: Path) -> None:
        uri = f"{(folder / 'index.sqlite').absolute().as_uri()}?mode=ro"
        self.connection = sqlite3.connect(uri, uri=True, isolation_level=None)

    def __enter__(self) -> sqlite3.Connection:
        self.connection.execute("begin")
        return self.connection

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def _names(index: sqlite3.Connection) -> list[str]:
    return [str(r[0]) for r in index.execute("select name from extents order by id")]


def _look_again(folder: Path, strangers: set[str], report: Verification) -> None:
    """A running daemon may have written or removed files meanwhile."""
    time.sleep(SETTLE_S)
    with _reading(folder) as index:
        known = set(_names(index))
    there = set(os.listdir(folder / "extents"))
    report.orphans = sorted(n for n in strangers if n in there and n not in known)
    report.missing = [n for n in report.missing if n in known and n not in there]


def _check_index(index: sqlite3.Connection, report: Verification) -> None:
    report.index += [r[0] for r in index.execute("pragma integrity_check(20)") if r[0] != "ok"]
    report.index += [
        f"{table}: a row refers to {parent} that is not there"
        for table, _, parent, _ in index.execute("pragma foreign_key_check").fetchmany(20)
    ]
    for table, wrong in _row_faults(index, report):
        report.index.append(f"{table}: {wrong} rows are not as they were written")


def _row_faults(index: sqlite3.Connection, report: Verification) -> Iterator[tuple[str, int]]:
    """(table, rows whose sum is wrong) of every table that has some."""
    sums: dict[str, tuple[str, Callable[..., int]]] = {
        "pages": ("id, space, parent, raw, tokens", page_sum),
        "pieces": ("page, page_row, extent, raw, extent_row, rows", piece_sum),
    }
    for table in (*_LOOSE, *sums):
        columns, total_of = sums.get(table, ("*", None))
        query = f"select {columns}{', sum' if total_of else ''} from {table}"
        wrong = 0
        for *row, total in index.execute(query):
            report.rows += 1
            wrong += (total_of(*row) if total_of else row_sum(table, row)) != total
        if wrong:
            yield table, wrong


def _check_file(path: Path, report: Verification, tokens: dict[str, tuple[int, np.ndarray]]) -> None:
    try:
        extent = Extent(path)
    except FileNotFoundError:
        report.missing.append(path.name)
        return
    except (ExtentCorrupt, OSError, ValueError) as e:
        report.bad[path.name] = f"{type(e).__name__}: {e}"
        return
    try:
        report.extents += 1
        if report.deep:
            for size in stripes(extent):
                report.bytes += size
            if not extent.sealed:
                tokens[path.name] = (extent.locate(False, 0)[1], extent.tokens)
        report.sealed += extent.sealed
    except (ExtentCorrupt, OSError, ValueError) as e:
        report.bad[path.name] = f"{type(e).__name__}: {e}"
    finally:
        extent.close()


def stripes(extent: Extent) -> Iterator[int]:
    """Read and check every stripe of an open extent; yields the bytes of each. Raises ExtentCorrupt or OSError."""
    for raw in (False, True):
        layer = 0
        while (place := extent.locate(raw, layer))[2]:
            offset, rows, words = place
            step = stripe_rows(words)
            for stripe, first in enumerate(range(0, rows, step)):
                size = 4 * words * (min(rows, first + step) - first)
                data = os.pread(extent.fd, size, offset + 4 * words * first)
                if len(data) != size:
                    raise ExtentCorrupt("file is shorter than its header says")
                extent.check(raw, layer, stripe, xxhash.xxh3_64_intdigest(data))
                yield size
            layer += 1


def _check_tokens(
    index: sqlite3.Connection, tokens: dict[str, tuple[int, np.ndarray]], report: Verification
) -> None:
    """The tokens that an extent keeps with its rows are those of the pages that the index says lie there."""
    query = (
        "select extents.name, pages.tokens, pieces.raw, extent_row, page_row, rows from pieces "
        "join pages on pages.id = page join extents on extents.id = extent"
    )
    for name, page, raw, extent_row, page_row, rows in index.execute(query):
        if name not in tokens:  # bad, or sealed
            continue
        packed, known = tokens[name]
        first = extent_row + (packed if raw else 0)
        wanted = np.frombuffer(page, "<i4")[page_row : page_row + rows]
        if not np.array_equal(known[first : first + rows], wanted):
            report.bad[name] = "its tokens are not those of the index"


def repair(
    folder: Path, report: Verification, vaults: Vaults | None, *, force: bool
) -> dict[str, Any] | None:
    """Rebuild the index when something is wrong with it or with extents, or with `force`; says what was kept.

    Damaged extents go to the quarantine folder. Precondition: no daemon holds the store.
    """
    if report.ok and not force:
        return None
    reason = "asked for" if report.ok else "verify found damage"
    for name in report.bad:
        if (folder / "extents" / name).exists():
            Files().move(folder / "extents" / name, folder / "quarantine")
    return rebuild(folder, Files(), reason, vaults).as_json()


def purge(folder: Path) -> int:
    """Delete what lies in the quarantine folder; returns its bytes."""
    quarantine, freed = folder / "quarantine", 0
    if quarantine.is_dir() and not quarantine.is_symlink():
        for path in quarantine.iterdir():
            facts = path.lstat()
            freed += facts.st_size
            if stat.S_ISDIR(facts.st_mode):
                shutil.rmtree(path)
            else:
                path.unlink()
    return freed


def main() -> None:
    parser = argparse.ArgumentParser(description="Verify a store that no daemon holds.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keys", type=Path)
    for flag in ("--deep", "--repair", "--rebuild", "--purge"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    os.umask(0o077)
    vaults = Vaults(options.keys) if options.keys is not None else None
    answer: dict[str, Any] = {}
    if (options.folder / "index.sqlite").exists():
        report = verify(options.folder, deep=options.deep or options.repair)
        answer = report.as_json()
        if options.repair or options.rebuild:
            answer["rebuilt"] = repair(options.folder, report, vaults, force=options.rebuild)
    else:
        answer = Verification(options.deep).as_json()
    if options.purge:
        answer["purged_bytes"] = purge(options.folder)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
