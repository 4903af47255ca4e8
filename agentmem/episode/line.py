"""The cached rows of one layer: fewer than there are tokens, each at the position that it was computed at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.episode.rows import LayerKind
from agentmem.episode.selection import Ids


@dataclass(slots=True)
class Line:
    """| lead: sinks, pinned | body: what was chosen, of each head its own | tail: the newest tokens, all heads |

    lead [heads, s, width] holds positions 0 to s; body [rows of all heads, width], head after head, `counts` [heads] of them,
    with positions int32, ascending within a head; tail [heads, t, width] from position `tail_start` on.
    """

    kind: LayerKind
    lead: mx.array
    body: mx.array
    counts: Ids
    positions: Ids
    tail: mx.array
    tail_start: int

    @property
    def heads(self) -> int:
        return self.kind.shape.heads

    @property
    def held(self) -> int:
        """Rows of all heads that are in memory."""
        lead, tail = int(self.lead.shape[1]), int(self.tail.shape[1])
        return int(self.counts.sum()) + self.heads * (lead + tail)

    @property
    def per_head(self) -> list[int]:
        """Rows of each head, the lead among them."""
        return [int(n) + self.lead.shape[1] + self.tail.shape[1] for n in self.counts]

    @property
    def nbytes(self) -> int:
        return int(self.lead.nbytes + self.body.nbytes + self.tail.nbytes)

    def past(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array | None]:
        """Keys, as the key map leaves them, and values [heads, n, dim], and which of them are rows: None for all of them.

        n is that of the longest head: lead, body, room, tail.
        """
        padded, visible = self._padded()
        parts = [self.kind.lead.parts(self.lead, dtype)] if self.lead.shape[1] else []
        parts += [self.kind.body.parts(x, dtype) for x in (padded, self.tail) if x.shape[1]]
        if not parts:
            shape = self.kind.shape
            none = (shape.heads, 0)
            return mx.zeros((*none, shape.key_dim), dtype), mx.zeros((*none, shape.value_dim), dtype), None
        keys, values = (mx.concatenate([p[i] for p in parts], axis=1) for i in range(2))
        if visible is None:
            return keys, values, None
        lead, tail = self.lead.shape[1], self.tail.shape[1]
        return keys, values, mx.array(np.pad(visible, ((0, 0), (lead, tail)), constant_values=True))

    def _padded(self) -> tuple[mx.array, np.ndarray | None]:
        """The body [heads, longest, width]; where heads differ, which of these are rows."""
        longest = int(self.counts.max(initial=0))
        if (self.counts == longest).all():
            return self.body.reshape(self.heads, longest, self.body.shape[1]), None
        at, starts = np.arange(longest)[None], self._starts()[:, None]
        visible = at < self.counts[:, None]
        return self.body[mx.array(np.where(visible, starts + at, 0))], visible

    def _starts(self) -> np.ndarray:
        """Where each head's rows begin in the body."""
        return np.cumsum(self.counts) - self.counts

    def append(self, keys: mx.array, values: mx.array, pinned: int = 0) -> None:
        """keys, mapped, and values [heads, n, dim] of the tokens behind the last one: held as rows from here on.

        The first `pinned` of them are sinks: nothing but sinks is there yet.
        """
        if pinned:
            rows = self.kind.lead.rows(keys[:, :pinned], values[:, :pinned])
            self.lead = mx.concatenate([self.lead, rows], axis=1)
            self.tail_start += pinned
        if pinned < keys.shape[1]:
            rows = self.kind.body.rows(keys[:, pinned:], values[:, pinned:])
            self.tail = mx.concatenate([self.tail, rows], axis=1) if self.tail.shape[1] else rows

    def candidates(self, scores: np.ndarray) -> list[np.ndarray]:
        """Scores [heads, n] of rows as `past` gives them -> of each head those of its body and the tail."""
        lead, longest = self.lead.shape[1], int(self.counts.max(initial=0))
        body, tail = scores[:, lead : lead + longest], scores[:, lead + longest :]
        return [np.concatenate([body[h, :n], tail[h]]) for h, n in enumerate(self.counts)]

    def candidate_positions(self) -> list[np.ndarray]:
        """Of each head the positions of its body and the tail."""
        tail = np.arange(self.tail.shape[1], dtype=np.int32) + self.tail_start
        return [np.concatenate([p, tail]) for p in np.split(self.positions, np.cumsum(self.counts)[:-1])]

    def keep(self, chosen: Sequence[Ids]) -> None:
        """Of each head the candidates that stay, ascending; the tail is part of the body then. Rows move as they are."""
        positions = [p[c] for p, c in zip(self.candidate_positions(), chosen, strict=True)]
        total, length = int(self.counts.sum()), int(self.tail.shape[1])
        places = [
            np.where(c < n, c + start, total + h * length + c - n)
            for h, (c, n, start) in enumerate(zip(chosen, self.counts, self._starts(), strict=True))
        ]
        flat = self.tail.reshape(self.heads * length, self.body.shape[1])
        self.body = mx.concatenate([self.body, flat])[mx.array(np.concatenate(places).astype(np.int32))]
        self.counts = np.array([len(c) for c in chosen], dtype=np.int32)
        self.positions = np.concatenate(positions).astype(np.int32)
        self.tail_start += length
        self.tail = self.tail[:, :0]

    def cut(self, rows: int) -> Line:
        """The same with the last `rows` of the tail not there."""
        keep = self.tail.shape[1] - rows
        assert keep >= 0
        return Line(
            self.kind, self.lead, self.body, self.counts, self.positions, self.tail[:, :keep], self.tail_start
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but the kind, for a checkpoint: rows as the integers that their bits are."""
        return {
            "lead": _bits(self.lead), "body": _bits(self.body), "tail": _bits(self.tail), "counts": self.counts,
            "positions": self.positions, "tail_start": np.array(self.tail_start),
        }  # fmt: skip

    @classmethod
    def of_arrays(cls, kind: LayerKind, arrays: dict[str, np.ndarray]) -> Line:
        """The inverse of `arrays`."""
        like = empty_line(kind)
        rows = {
            name: mx.array(arrays[name]).view(getattr(like, name).dtype) for name in ("lead", "body", "tail")
        }
        return cls(
            kind, counts=arrays["counts"], positions=arrays["positions"], tail_start=int(arrays["tail_start"]), **rows
        )  # fmt: skip


def empty_line(kind: LayerKind) -> Line:
    """A layer that holds nothing yet."""
    shape = kind.shape
    keys = mx.zeros((shape.heads, 1, shape.key_dim))
    values = mx.zeros((shape.heads, 1, shape.value_dim))
    lead, body = kind.lead.rows(keys, values)[:, :0], kind.body.rows(keys, values)[:, :0]
    none: Any = np.zeros(0, np.int32)
    return Line(kind, lead, body.reshape(0, body.shape[2]), np.zeros(shape.heads, np.int32), none, body, 0)


def _bits(rows: mx.array) -> np.ndarray:
    kinds = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}
    return np.array(mx.contiguous(rows).view(kinds[rows.itemsize]))
