"""Placement: rows that were read for a discrete GPU, put into the arena with one scatter per layer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.blockpool.arena import DeviceArena
from agentmem.blockpool.restore import RestorePlan, Run

Loaded = dict[tuple[int, bool], list[mx.array]]


def load_files(plan: RestorePlan, paths: Mapping[int, Path]) -> Loaded:
    """Rows of the plan's runs out of whole extents: {(extent, raw): per layer uint32 [rows of the runs in order, words]}.

    A damaged file gives nothing here; the reader threads find the same damage and report it.
    """
    rows: Loaded = {}
    try:
        files: dict[int, Any] = {e: mx.load(str(path)) for e, path in paths.items()}
        for (extent, raw), runs in plan.runs.items():
            if extent in files:
                name = "raw" if raw else "packed"
                rows[extent, raw] = [
                    _take(files[extent][f"{name}.{i}"], runs) for i in range(plan.geometry.layers)
                ]
        mx.eval(*rows.values())
    except (OSError, KeyError, RuntimeError, ValueError):
        return {}
    return rows


def _take(rows: mx.array, runs: list[Run]) -> mx.array:
    """The rows of `runs`, one after the other; the array itself when they are all of it in order."""
    total = sum(r.rows for r in runs)
    if total == rows.shape[0] and all(a.extent_row + a.rows == b.extent_row for a, b in pairwise(runs)):
        return rows
    return rows[mx.array(np.concatenate([np.arange(r.extent_row, r.extent_row + r.rows) for r in runs]))]


def from_host(plan: RestorePlan, kept: Mapping[tuple[int, bool], np.ndarray]) -> Loaded:
    """The same for rows that host threads read: one copy to the device for each, then views."""
    g = plan.geometry
    rows: Loaded = {}
    for (extent, raw), flat in kept.items():
        words = g.raw_words if raw else g.packed_words
        n = flat.size // sum(words)
        splits = np.cumsum([n * w for w in words])[:-1].tolist()
        rows[extent, raw] = [part.reshape(n, -1) for part in mx.split(mx.array(flat), splits)]
    return rows


def place(plan: RestorePlan, arena: DeviceArena, rows: Loaded) -> None:
    """Write all rows of the plan into the arena; rows that lay raw and belong packed are packed on the way."""
    g = plan.geometry
    where: list[np.ndarray] = []
    parts: list[list[mx.array]] = [[] for _ in range(g.layers)]
    repack: list[list[mx.array]] = [[] for _ in range(g.layers)]
    raw: dict[int, list[tuple[int, list[mx.array]]]] = {}
    scratch_rows: list[np.ndarray] = []
    for key, runs in plan.runs.items():
        at = 0
        for run in runs:
            piece = [r[at : at + run.rows] for r in rows[key]]
            at += run.rows
            if run.to == "packed":
                where.append(np.arange(run.at, run.at + run.rows))
                _extend(parts, piece)
            elif run.to == "raw":
                raw.setdefault(run.slot, []).append((run.at, piece))
            else:
                scratch_rows.append(np.arange(run.at, run.at + run.rows))
                _extend(repack, piece)
    for slot, pieces in raw.items():
        where.append(np.arange(slot * g.page_tokens, (slot + 1) * g.page_tokens))
        _extend(parts, _slot_image(plan, [p for _, p in sorted(pieces, key=lambda p: p[0])]))
    if scratch_rows:
        where.append(_repack_targets(plan)[np.concatenate(scratch_rows)])
        _extend(parts, [c.pack(mx.concatenate(r)) for c, r in zip(g.codecs, repack, strict=True)])
    arena.write_rows(np.concatenate(where), [mx.concatenate(p) for p in parts])


def _extend(lists: list[list[mx.array]], pieces: list[mx.array]) -> None:
    for target, piece in zip(lists, pieces, strict=True):
        target.append(piece)


def _slot_image(plan: RestorePlan, pieces: list[list[mx.array]]) -> list[mx.array]:
    """One slot of a raw page per layer, as packed arena rows: its raw rows from row 0 on, then zeros."""
    g = plan.geometry
    images = []
    for layer, (slot_words, words) in enumerate(zip(g.slot_words, g.packed_words, strict=True)):
        flat = mx.concatenate([p[layer].reshape(-1) for p in pieces])
        images.append(mx.pad(flat, (0, slot_words - flat.size)).reshape(-1, words))
    return images


def _repack_targets(plan: RestorePlan) -> np.ndarray:
    """Arena row of every scratch row."""
    targets = np.zeros(plan.scratch_rows, np.int64)
    for slots, page_row, at, n in plan.repack:
        targets[at : at + n] = np.arange(n) + slots[0] * plan.geometry.page_tokens + page_row
    return targets
