"""The plan of a decode step: which warps read which stretch of which sequence's rows.

Host work only, kept as long as no sequence gets a page, joins or leaves; what changes with every token is `state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np

from agentmem.quant.rows import RowCodec

WIDE_ROWS = 16
"""Rows of one product: query heads of a KV head, times the sequences that read the same pages."""
NARROW_ROWS = 8
WARPS = 2112
"""As many as a large GPU holds at once; more would make the merge of their results longer, not the reading shorter."""

PACKED, RAW, TAIL = 0, 1, 2
KIND_BIT = 30


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
    """A plan in the words of one layer's geometry: items uint32 [n, 5], runs uint32 [n, 2] (see decode.h)."""

    items: mx.array
    runs: mx.array


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Runs [first, end) that all `members` read; `end` may be one behind the last run, which means the tail."""

    members: tuple[int, ...]
    first: int
    end: int


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
    _layouts: dict[tuple[int, int], Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        offsets = np.cumsum([0, *(len(r.slots) + 1 for r in self.reaches)])
        stretches = self._stretches(tuple(range(len(self.reaches))), 0)
        total = sum(s.end - s.first for s in stretches)
        per = max(1, -(-total * self.kv_heads // WARPS))
        items, entries = [], list[int]()
        for s in stretches:
            lead = self.reaches[s.members[0]]
            position = np.concatenate([[0], np.cumsum(lead.rows)])
            base = int(offsets[s.members[0]])
            for first in range(s.first, s.end, per):
                end = min(first + per, s.end)
                items.append(
                    (base + first, base + end, len(entries), len(entries) + len(s.members), position[first])
                )
                entries += s.members
        self._items = np.array(items, np.uint32)
        self.wide = max(len(s.members) for s in stretches) * self.repeat > NARROW_ROWS
        self.entries = mx.array(np.array(entries, np.uint32))
        self.order = mx.array(np.argsort(entries, kind="stable").astype(np.uint32))
        counts = np.bincount(entries, minlength=len(self.reaches))
        self.starts = mx.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32))

    def _stretches(self, members: tuple[int, ...], first: int) -> list[_Stretch]:
        """Cut into stretches what `members`, alike up to run `first`, read from there on."""
        if len(members) == 1:
            return [_Stretch(members, first, len(self.reaches[members[0]].slots) + 1)]
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

    @cached_property
    def bytes_shared(self) -> int:
        """Runs that are read for more than one sequence, times the readings saved."""
        size = self._items[:, 3] - self._items[:, 2] - 1
        return int((size * (self._items[:, 1] - self._items[:, 0])).sum())

    def advance(self, tail_rows: Sequence[int], lows: Sequence[int] | None = None) -> None:
        """The step to come: rows of each tail, its own token included, and the first position that each query sees."""
        state = np.zeros((len(self.reaches), 2), np.uint32)
        state[:, 0] = tail_rows
        if lows is not None:
            state[:, 1] = lows
        self.state = mx.array(state)

    def layout(self, codec: RowCodec) -> Layout:
        """The plan for layers of this geometry."""
        key = codec.packed_words, codec.raw_words
        if key not in self._layouts:
            runs = []
            for r in self.reaches:
                at = np.append(r.slots * self.page_tokens * key[0], r.tail * self.page_tokens * key[1])
                kinds = np.append(np.where(r.raw, RAW, PACKED), TAIL)
                runs.append(np.stack([at, np.append(r.rows, 0) + (kinds << KIND_BIT)], axis=1))
            self._layouts[key] = Layout(
                mx.array(self._items), mx.array(np.concatenate(runs).astype(np.uint32))
            )
        return self._layouts[key]
