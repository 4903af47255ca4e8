"""Placement: rows that were staged for a discrete GPU, put into the arena with one scatter per layer."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from agentmem.blockpool.arena import DeviceArena
from agentmem.blockpool.restore import RestorePlan, stage_layout

Pieces = list[mx.array]


def layer_groups(plan: RestorePlan, stage_words: int) -> list[range]:
    """The layers in consecutive groups whose rows fit into `stage_words`, at least one layer each."""
    g = plan.geometry
    rows = {
        raw: sum(r.rows for (_, kind), runs in plan.runs.items() if kind == raw for r in runs)
        for raw in (False, True)
    }
    groups: list[range] = []
    first, filled = 0, 0
    for layer in range(g.layers):
        need = rows[False] * g.packed_words[layer] + rows[True] * g.raw_words[layer]
        if filled and filled + need > stage_words:
            groups.append(range(first, layer))
            first, filled = layer, 0
        filled += need
    return [*groups, range(first, g.layers)]


def stage_need(plan: RestorePlan, layers: range) -> int:
    """Words that the rows of `layers` take in the stage."""
    return sum(rows * words for _, rows, words in stage_layout(plan, layers).values())


def place(
    plan: RestorePlan, arena: DeviceArena, stage: mx.array, layers: range, *, in_use: bool = True
) -> None:
    """Write the staged rows of `layers` into the arena; rows that lay raw and belong packed are packed on the way.

    `in_use`: whether the device may be reading these layers.
    """
    g = plan.geometry
    rows = {at: stage[a : a + n * w].reshape(n, w) for at, (a, n, w) in stage_layout(plan, layers).items()}
    where: list[np.ndarray] = []
    parts: list[Pieces] = [[] for _ in layers]
    repack: list[Pieces] = [[] for _ in layers]
    raw: dict[int, list[tuple[int, Pieces]]] = {}
    scratch_rows: list[np.ndarray] = []
    for key, runs in plan.runs.items():
        at = 0
        for run in runs:
            piece = [rows[key, layer][at : at + run.rows] for layer in layers]
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
        _extend(parts, _slot_image(plan, [p for _, p in sorted(pieces, key=lambda p: p[0])], layers))
    if scratch_rows:
        where.append(_repack_targets(plan)[np.concatenate(scratch_rows)])
        _extend(
            parts, [g.codecs[layer].pack(mx.concatenate(r)) for layer, r in zip(layers, repack, strict=True)]
        )
    arena.write_rows(np.concatenate(where), [mx.concatenate(p) for p in parts], layers.start, in_use=in_use)


def _extend(lists: list[Pieces], pieces: Pieces) -> None:
    for target, piece in zip(lists, pieces, strict=True):
        target.append(piece)


def _slot_image(plan: RestorePlan, pieces: list[Pieces], layers: range) -> Pieces:
    """One slot of a raw page per layer, as packed arena rows: its raw rows from row 0 on, then zeros."""
    g = plan.geometry
    images = []
    for i, layer in enumerate(layers):
        flat = mx.concatenate([p[i].reshape(-1) for p in pieces])
        images.append(mx.pad(flat, (0, g.slot_words[layer] - flat.size)).reshape(-1, g.packed_words[layer]))
    return images


def _repack_targets(plan: RestorePlan) -> np.ndarray:
    """Arena row of every scratch row."""
    targets = np.zeros(plan.scratch_rows, np.int64)
    for slots, page_row, at, n in plan.repack:
        targets[at : at + n] = np.arange(n) + slots[0] * plan.geometry.page_tokens + page_row
    return targets
