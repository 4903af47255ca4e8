"""The plan of a decode step: which warps read which stretch of which sequence's rows.

Host work only, kept as long as no sequence gets a page, joins or leaves; what changes with every token is `state`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.quant.device import on_device
from agentmem.quant.rows import RowCodec

WIDE_ROWS = 16
"""Rows of one product: query heads of a KV head, times the sequences that read the same pages."""
NARROW_ROWS = 8
WARPS = 2112
"""As many as a large GPU holds at once; what is more would wait for a second turn."""
ROOM = 64
"""Entries: memory of a size that a step has given back is had again at once, of another it is not."""
HEADER, ITEM = 8, 5

PACKED, RAW, TAIL = 0, 1, 2
KIND_BIT, LENGTH_BIT = 30, 15
TILE = 16
TAIL_PARTS = 4
"""Stretches of a tail, read by warps of their own: how long a tail is changes with every step, the plan does not."""

RAW_COST = 2
"""Of a tile of raw rows, in tiles of packed ones."""
LEAST_COST = 4


@dataclass(frozen=True, slots=True)
class Reach:
    """The stored rows of one sequence, in the order of their positions.

    `slots`, `rows` and `raw` int64/bool [runs]: arena slot, valid rows and kind of each run. `tail`: its slot of the tails.
    """

    slots: np.ndarray
    rows: np.ndarray
    raw: np.ndarray
    tail: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A plan in the words of one layer's geometry and of groups of so many warps: `plan` uint32 (see plan.h)."""

    plan: mx.array
    bundles: int
    """Of as many items as a group has warps, read for the same sequences."""
    room: int
    """For entries, of which a bundle makes one for each of its sequences."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Runs [first, end) that all `members` read; those behind the last run in the arena are the tail's parts."""

    members: tuple[int, ...]
    first: int
    end: int


_Bundle = tuple[_Stretch, list[tuple[int, int]]]
"""Items [first, end) of a stretch, as many as a group has warps or fewer."""


def _parts(items: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@dataclass
class Batch:
    """What the fused path knows of the sequences of a step, whose order is that of the queries.

    `state` uint32 [B, 2]: rows of each tail with the step's own token, and the first visible position.
    """

    reaches: Sequence[Reach]
    page_tokens: int
    kv_heads: int
    repeat: int
    """Query heads of a KV head."""
    share: bool = True
    """Read what sequences have in common once."""
    state: mx.array = field(init=False)
    launches: dict[Any, Any] = field(default_factory=dict)
    """What whoever launches kernels by this plan keeps with it."""
    _layouts: dict[tuple[int, int, int, bool], Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._part = max(TILE, self.page_tokens // TAIL_PARTS)
        self._parts = -(-self.page_tokens // self._part)
        self._found = self._stretches(tuple(range(len(self.reaches))), 0)
        self.wide = max(len(s.members) for s in self._found) * self.repeat > NARROW_ROWS

    def _bundles(self, group: int, packs: bool) -> tuple[np.ndarray, list[int]]:
        """(items uint32 [bundles * group, 5], the sequence of each entry): as many long items as a GPU holds at once.

        Bundles of short items come first: when they are done, theirs is the place of a long one.
        """
        leads = [s.members[0] for s in self._found]
        sums = [np.concatenate([[0], np.cumsum(self._costs(self.reaches[lead]))]).tolist() for lead in leads]
        total = sum(c[s.end] - c[s.first] for c, s in zip(sums, self._found, strict=True))
        least = max(LEAST_COST, -(-total * self.kv_heads // WARPS))
        while True:
            short, long = list[_Bundle](), list[_Bundle]()
            for s, c in zip(self._found, sums, strict=True):
                cuts = self._cut(c, s, least, packs)
                for is_short, some in groupby(cuts, lambda cut: 2 * (c[cut[1]] - c[cut[0]]) <= least):  # noqa: B023
                    (short if is_short else long).extend((s, part) for part in _parts(list(some), group))
            if len(long) * group * self.kv_heads <= WARPS or least > total:
                return self._items(short + long, group)
            least += 1 + least // 16

    def _items(self, bundles: Sequence[_Bundle], group: int) -> tuple[np.ndarray, list[int]]:
        offsets = np.cumsum([0, *(len(r.slots) + self._parts for r in self.reaches)])
        positions = {s.members[0]: self._positions(self.reaches[s.members[0]]) for s in self._found}
        items, entries = list[tuple[int, ...]](), list[int]()
        for s, cuts in bundles:
            base, position = int(offsets[s.members[0]]), positions[s.members[0]]
            mine = len(entries), len(entries) + len(s.members)
            items += [(base + first, base + end, *mine, int(position[first])) for first, end in cuts]
            items += [(0, 0, *mine, 0)] * (group - len(cuts))
            entries += s.members
        return np.array(items, np.uint32), entries

    def _costs(self, reach: Reach) -> np.ndarray:
        tiles = -(-reach.rows // TILE) * np.where(reach.raw, RAW_COST, 1)
        return np.append(tiles, [RAW_COST * -(-self._part // TILE)] * self._parts)

    def _positions(self, reach: Reach) -> np.ndarray:
        """Of the first row of each run and each part of the tail."""
        starts = np.concatenate([[0], np.cumsum(reach.rows)])
        return np.append(starts, starts[-1] + self._part * np.arange(1, self._parts))

    def _cut(self, sums: list[int], s: _Stretch, least: int, packs: bool) -> list[tuple[int, int]]:
        """Items of a stretch, of `least` or a little more; a part of a tail is one, and a raw run where others are packed."""
        raw = self.reaches[s.members[0]].raw
        alone = np.flatnonzero(raw).tolist() if packs else []
        ends = {*alone, *(i + 1 for i in alone), *range(len(raw), s.end), s.end}
        cuts, first = list[tuple[int, int]](), s.first
        for end in sorted(e for e in ends if s.first < e <= s.end):
            while first < end:
                to = min(bisect_left(sums, sums[first] + least, first + 1), end)
                cuts.append((first, to))
                first = to
        return cuts

    def _stretches(self, members: tuple[int, ...], first: int) -> list[_Stretch]:
        """Cut into stretches what `members`, alike up to run `first`, read from there on."""
        if len(members) == 1:
            return [_Stretch(members, first, len(self.reaches[members[0]].slots) + self._parts)]
        if not self.share:
            return [s for m in members for s in self._stretches((m,), first)]
        found: list[_Stretch] = []
        end = self._common(members)
        if end > first:
            size = max(1, WIDE_ROWS // self.repeat)
            found += [_Stretch(members[i : i + size], first, end) for i in range(0, len(members), size)]
        parts: dict[int, list[int]] = {}
        for m in members:
            slots = self.reaches[m].slots
            parts.setdefault(int(slots[end]) if end < len(slots) else -1 - m, []).append(m)
        return found + [s for part in parts.values() for s in self._stretches(tuple(part), end)]

    def _common(self, members: tuple[int, ...]) -> int:
        """Leading runs that are the same rows for all members."""
        lead = self.reaches[members[0]]
        end = len(lead.slots)
        for m in members[1:]:
            other = self.reaches[m]
            n = min(end, len(other.slots))
            same = (lead.slots[:n] == other.slots[:n]) & (lead.rows[:n] == other.rows[:n])
            end = n if same.all() else int(np.argmin(same))
        return end

    def advance(self, tail_rows: Sequence[int], lows: Sequence[int] | None = None) -> None:
        """The step to come: rows of each tail, its own token included, and the first position that each query sees."""
        state = np.zeros((len(self.reaches), 2), np.uint32)
        state[:, 0] = tail_rows
        if lows is not None:
            state[:, 1] = lows
        self.state = on_device(state)

    def layout(self, codec: RowCodec, group: int) -> Layout:
        """The plan for layers of this geometry, for groups of `group` warps."""
        key = codec.packed_words, codec.raw_words, group, codec.format.packs
        if key not in self._layouts:
            items, entries = self._bundles(group, codec.format.packs)
            counts = np.bincount(entries, minlength=len(self.reaches))
            parts = [
                np.array(entries), self._runs(*key[:2]).reshape(-1), np.concatenate([[0], np.cumsum(counts)]),
                np.argsort(entries, kind="stable"),
            ]  # fmt: skip
            room = -(-len(entries) // ROOM) * ROOM
            at = HEADER + items.size + np.cumsum([0, *(len(p) for p in parts)])
            header = np.array([*at[:-1], room, *[0] * (HEADER - len(at))])
            plan = np.concatenate([header, items.reshape(-1), *parts]).astype(np.uint32)
            self._layouts[key] = Layout(on_device(plan), len(items) // group, room)
        return self._layouts[key]

    def _runs(self, packed_words: int, raw_words: int) -> np.ndarray:
        runs = []
        for r in self.reaches:
            at = np.append(
                r.slots * self.page_tokens * packed_words,
                [r.tail * self.page_tokens * raw_words] * self._parts,
            )
            fields = np.append(r.rows, self._part * np.arange(self._parts) + (self._part << LENGTH_BIT))
            kinds = np.append(np.where(r.raw, RAW, PACKED), [TAIL] * self._parts)
            runs.append(np.stack([at, fields + (kinds << KIND_BIT)], axis=1))
        return np.concatenate(runs)
