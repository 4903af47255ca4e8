"""Restore: rows of pages from extents into the arena, every byte checked before it may be used."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from agentmem.blockpool.extent import Extent, ExtentCorrupt, stripe_rows
from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.page import Page
from agentmem.blockpool.vault import Vaults

IOV_MAX = 1024
HEADERS = 256
JOB_BYTES = 4 << 20


class Run(NamedTuple):
    """Consecutive rows of an extent and where they go: packed arena rows, rows of one raw slot, or rows of the scratch buffer."""

    extent_row: int
    rows: int
    to: Literal["packed", "raw", "scratch"]
    at: int
    slot: int = 0


@dataclass(slots=True)
class RestorePlan:
    """Which runs of which extents fill which pages. `repack`: (page, first page row, scratch row, rows) of rows that lie raw on
    disk and packed in RAM: packing them again gives the same bits, because it is row-wise."""

    geometry: Geometry
    pages: list[tuple[Page, tuple[int, ...]]]
    runs: dict[tuple[int, bool], list[Run]] = field(default_factory=dict)
    repack: list[tuple[tuple[int, ...], int, int, int]] = field(default_factory=list)
    scratch_rows: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        for page, slots in self.pages:
            self._plan_page(page, slots)
        for key, runs in self.runs.items():
            self.runs[key] = _coalesce(sorted(runs))

    def _plan_page(self, page: Page, slots: tuple[int, ...]) -> None:
        assert page.pieces is not None
        g = self.geometry
        for piece in page.pieces:
            runs = self.runs.setdefault((piece.extent, piece.raw), [])
            self.bytes += piece.rows * g.row_bytes(piece.raw)
            if not piece.raw:
                runs.append(
                    Run(piece.extent_row, piece.rows, "packed", slots[0] * g.page_tokens + piece.page_row)
                )
            elif page.raw:
                runs.extend(self._raw_runs(piece.extent_row, piece.page_row, piece.rows, slots))
            else:
                runs.append(Run(piece.extent_row, piece.rows, "scratch", self.scratch_rows))
                self.repack.append((slots, piece.page_row, self.scratch_rows, piece.rows))
                self.scratch_rows += piece.rows

    def _raw_runs(self, extent_row: int, page_row: int, rows: int, slots: tuple[int, ...]) -> list[Run]:
        per = self.geometry.raw_per_slot
        runs = []
        while rows > 0:
            slot, at = divmod(page_row, per)
            n = min(rows, per - at)
            runs.append(Run(extent_row, n, "raw", at, slots[slot]))
            extent_row, page_row, rows = extent_row + n, page_row + n, rows - n
        return runs


def _coalesce(runs: list[Run]) -> list[Run]:
    """Merge runs that follow each other on disk and in memory."""
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.to, last.slot) == (run.to, run.slot)
            and last.extent_row + last.rows == run.extent_row
            and last.at + last.rows == run.at
        ):
            merged[-1] = last._replace(rows=last.rows + run.rows)
        else:
            merged.append(run)
    return merged


class Reader:
    """Reads and checks extents on a few threads. Holds no MLX object."""

    def __init__(self, folder: Path, threads: int | None = None, vaults: Vaults | None = None) -> None:
        self.folder = folder
        self._vaults = vaults
        self._headers: OrderedDict[str, Extent] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 2), thread_name_prefix="restore")

    def _open(self, name: str) -> Extent:
        """An extent, by the header that was read last time where there is one: a long header takes milliseconds."""
        with self._lock:
            known = self._headers.pop(name, None)
        extent = known.again() if known is not None else Extent(self.folder / name, self._vaults)
        with self._lock:
            self._headers[name] = extent
            while len(self._headers) > HEADERS:
                self._headers.popitem(last=False)
        return extent

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(
        self,
        plan: RestorePlan,
        names: Mapping[int, str],
        views: Sequence[np.ndarray] | None,
        stage: Staged | None = None,
        layers: range | None = None,
    ) -> Read:
        """Read and check the runs of the plan. Blocks the calling thread, which must not be the engine's.

        With `views`, the arena's slots per layer (uint32 [slots, slot_words]), rows go where the plan says. With `stage`, the
        rows of its layers go there, as `stage_layout` says. With neither they are only checked. `layers`: those of the arena
        that are read, all by default.
        """
        scratch = [np.empty((plan.scratch_rows, w), np.uint32) for w in plan.geometry.raw_words]
        bad: dict[int, str] = {}
        opened: dict[int, Extent] = {}
        try:
            for extent in {e for e, _ in plan.runs}:
                try:
                    opened[extent] = self._open(names[extent])
                except (OSError, ExtentCorrupt, ValueError, KeyError) as e:
                    bad[extent] = f"{type(e).__name__}: {e}"
            units: dict[int, list[Unit]] = {e: [] for e in opened}
            for (extent, raw), layer, runs, targets in _targets(plan, views, scratch, stage, layers):
                if extent in opened and extent not in bad:
                    try:
                        units[extent] += _units(opened[extent], raw, layer, runs, targets)
                    except ExtentCorrupt as e:
                        bad[extent] = f"ExtentCorrupt: {e}"
            jobs = [
                (extent, self._pool.submit(_read_units, opened[extent], portion))
                for extent, mine in units.items()
                for portion in _portions(mine)
            ]
            for extent, job in jobs:
                try:
                    job.result()
                except (OSError, ExtentCorrupt, ValueError) as e:
                    bad[extent] = f"{type(e).__name__}: {e}"
        finally:
            for extent_file in opened.values():
                extent_file.close()
        return Read(scratch, bad)


class Read(NamedTuple):
    """Outcome of a read: scratch rows per layer, uint32 [scratch rows, raw_words]; {extent id: what is wrong with it}."""

    scratch: list[np.ndarray]
    bad: dict[int, str]


class Staged(NamedTuple):
    """Memory, uint32 [words], that the rows of some layers are read into."""

    memory: np.ndarray
    layers: range


Key = tuple[int, bool]


def stage_layout(plan: RestorePlan, layers: range) -> dict[tuple[Key, int], tuple[int, int, int]]:
    """{((extent, raw), layer): (first word, rows, words per row)}: the rows of an extent's runs, one after the other."""
    layout: dict[tuple[Key, int], tuple[int, int, int]] = {}
    at = 0
    for key, runs in plan.runs.items():
        rows = sum(r.rows for r in runs)
        for layer in layers:
            words = (plan.geometry.raw_words if key[1] else plan.geometry.packed_words)[layer]
            layout[key, layer] = (at, rows, words)
            at += rows * words
    return layout


def _targets(
    plan: RestorePlan,
    views: Sequence[np.ndarray] | None,
    scratch: list[np.ndarray],
    stage: Staged | None,
    layers: range | None,
) -> Iterator[tuple[Key, int, list[Run], Targets]]:
    """((extent, raw), layer, runs, where they go) for everything that is to be read."""
    g = plan.geometry
    if stage is None:
        for key, runs in plan.runs.items():
            for layer in layers if layers is not None else range(g.layers):
                yield (
                    key,
                    layer,
                    runs,
                    Targets(g, layer, views[layer] if views is not None else None, scratch[layer]),
                )
        return
    moved = {key: _one_after_the_other(runs) for key, runs in plan.runs.items()}
    for (key, layer), (at, rows, words) in stage_layout(plan, stage.layers).items():
        memory = stage.memory[at : at + rows * words].reshape(rows, words)
        yield key, layer, moved[key], Targets(g, layer, None, memory)


def _one_after_the_other(runs: list[Run]) -> list[Run]:
    """The runs with the rows of a stage as their target; those that follow each other on disk are one."""
    ends = np.cumsum([r.rows for r in runs])
    return _coalesce(
        [Run(r.extent_row, r.rows, "scratch", int(e) - r.rows) for r, e in zip(runs, ends, strict=True)]
    )


@dataclass(slots=True)
class Targets:
    """Memory of one layer that runs are read into."""

    geometry: Geometry
    layer: int
    view: np.ndarray | None
    scratch: np.ndarray

    def buffer(self, run: Run, skip: int, rows: int) -> memoryview:
        """Bytes of `rows` rows of `run`, from its row `skip` on."""
        if run.to == "scratch":
            part = self.scratch[run.at + skip : run.at + skip + rows]
        elif self.view is None:
            words = (self.geometry.packed_words if run.to == "packed" else self.geometry.raw_words)[
                self.layer
            ]
            part = np.empty((rows, words), np.uint32)
        elif run.to == "packed":
            words = self.geometry.packed_words[self.layer]
            part = self.view.reshape(-1, words)[run.at + skip : run.at + skip + rows]
        else:
            words = self.geometry.raw_words[self.layer]
            part = self.view[run.slot, (run.at + skip) * words : (run.at + skip + rows) * words]
        return memoryview(part).cast("B")


class Unit(NamedTuple):
    """One stripe of one layer: rows [first, last) of the extent, `bytes` of them in all, and the runs that some of them fill."""

    raw: bool
    layer: int
    stripe: int
    first: int
    last: int
    bytes: int
    runs: list[Run]
    targets: Targets


def _units(extent: Extent, raw: bool, layer: int, runs: list[Run], targets: Targets) -> Iterator[Unit]:
    """The stripes that hold `runs`. Raises ExtentCorrupt when they lie beyond the layer's rows."""
    _, total, words = extent.locate(raw, layer)
    if runs[-1].extent_row + runs[-1].rows > total:
        raise ExtentCorrupt(f"rows beyond the {total} rows of layer {layer}")
    step = stripe_rows(words)
    for stripe in sorted(
        {s for r in runs for s in range(r.extent_row // step, (r.extent_row + r.rows - 1) // step + 1)}
    ):
        first, last = stripe * step, min(total, (stripe + 1) * step)
        yield Unit(raw, layer, stripe, first, last, (last - first) * words * 4, runs, targets)


def _portions(units: list[Unit]) -> Iterator[list[Unit]]:
    """Units in groups of about JOB_BYTES: a job of its own would cost more than reading a small stripe."""
    portion, size = list[Unit](), 0
    for unit in units:
        portion.append(unit)
        size += unit.bytes
        if size >= JOB_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _read_units(extent: Extent, units: list[Unit]) -> None:
    """Read whole stripes, the rows of their runs into place and the others into a throw-away buffer; check each stripe."""
    for unit in units:
        offset, _, words = extent.locate(unit.raw, unit.layer)
        buffers = _stripe_buffers(unit.runs, unit.first, unit.last, words, unit.targets)
        at = offset + unit.first * words * 4
        if not extent.sealed:
            extent.check(unit.raw, unit.layer, unit.stripe, _read_and_hash(extent.fd, buffers, at))
            continue
        sealed = bytearray(unit.bytes)
        extent.check(unit.raw, unit.layer, unit.stripe, _read_and_hash(extent.fd, [memoryview(sealed)], at))
        _scatter(extent.open_stripe(unit.raw, unit.layer, unit.stripe, sealed), buffers)


def _scatter(data: bytes, buffers: list[memoryview]) -> None:
    at = 0
    for buffer in buffers:
        buffer[:] = data[at : at + len(buffer)]
        at += len(buffer)


def _stripe_buffers(runs: list[Run], first: int, last: int, words: int, targets: Targets) -> list[memoryview]:
    buffers, at = [], first
    start = bisect_right(runs, first, key=lambda r: r.extent_row + r.rows)
    for run in islice(runs, start, None):
        a, b = max(run.extent_row, first), min(run.extent_row + run.rows, last)
        if a >= last:
            break
        if a > at:
            buffers.append(memoryview(bytearray((a - at) * words * 4)))
        buffers.append(targets.buffer(run, a - run.extent_row, b - a))
        at = b
    if at < last:
        buffers.append(memoryview(bytearray((last - at) * words * 4)))
    return buffers


def _read_and_hash(fd: int, buffers: list[memoryview], offset: int) -> int:
    digest = xxhash.xxh3_64()
    for i in range(0, len(buffers), IOV_MAX):
        part = buffers[i : i + IOV_MAX]
        want = sum(len(b) for b in part)
        if os.preadv(fd, part, offset) != want:
            raise ExtentCorrupt("file is shorter than its header says")
        offset += want
        for b in part:
            digest.update(b)
    return digest.intdigest()
