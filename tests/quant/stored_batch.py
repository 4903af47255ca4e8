"""Random stored rows of several sequences, and what attention over them is in plain float64 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from agentmem.quant.kernels.plan import Batch, Reach
from agentmem.quant.rows import RowCodec

PAGE = 64


class StoredBatch:
    """Sequences of `lengths` tokens whose first `shared` pages are the same: a raw first page, packed pages, a tail.

    Where `cut`, the last packed page of every sequence holds fewer rows than it could.
    """

    def __init__(
        self, codec: RowCodec, query_heads: int, lengths: Sequence[int], *, shared: int = 0, cut: bool = False,
        seed: int = 0, share: bool = True,
    ) -> None:  # fmt: skip
        self.codec, self.heads, self.lengths = codec, query_heads, list(lengths)
        self._rng = np.random.default_rng(seed)
        self._slots: list[np.ndarray] = []
        self._known: list[tuple[np.ndarray, np.ndarray]] = []
        self._per = codec.packed_words * PAGE // codec.raw_words
        self._tails = np.zeros((len(lengths), PAGE, codec.raw_words), np.uint32)
        common = [self._page(i == 0 or not codec.format.packs, PAGE) for i in range(shared)]
        reaches, self._keys, self._values = [], [], []
        self.rows: list[np.ndarray] = []
        self._fresh: list[tuple[mx.array, mx.array]] = []
        for i, length in enumerate(lengths):
            reaches.append(self._sequence(i, length, list(common), cut))
        order = self._rng.permutation(len(self._slots))
        self.arena = mx.array(np.concatenate([self._slots[j] for j in order]))
        place = np.argsort(order)
        self.tails = mx.array(self._tails)
        moved = [Reach(place[r.slots], r.rows, r.raw, r.tail) for r in reaches]
        self.batch = Batch(moved, PAGE, codec.shape.heads, query_heads // codec.shape.heads, share=share)
        self.batch.advance(self.tail_rows)
        dims = (len(lengths), query_heads, 1, codec.shape.key_dim)
        self.queries = mx.array(self._rng.standard_normal(dims).astype(np.float32))
        self.keys, self.values = (mx.stack([f[i] for f in self._fresh]) for i in (0, 1))
        self.scale = codec.shape.key_dim**-0.5

    def _rows(self, n: int) -> mx.array:
        shape = self.codec.shape
        keys = self._rng.standard_normal((shape.heads, n, shape.key_dim)) + self._rng.standard_normal(
            shape.key_dim
        )
        values = self._rng.standard_normal((shape.heads, n, shape.value_dim))
        return self.codec.raw(mx.array(keys.astype(np.float32)), mx.array(values.astype(np.float32)))

    def _page(self, raw: bool, rows: int) -> tuple[list[tuple[int, int, bool]], np.ndarray, np.ndarray]:
        """Runs (slot, rows, raw) of a new page, and its keys and values as they are stored."""
        words, stored = self.codec.packed_words, self._rows(rows)
        runs = []
        if raw:
            for first in range(0, rows, self._per):
                part = np.array(stored[first : first + self._per])
                slot = self._rng.integers(0, 1 << 32, PAGE * words, dtype=np.uint32)
                slot[: part.size] = part.reshape(-1)
                runs.append((len(self._slots), len(part), True))
                self._slots.append(slot.reshape(PAGE, words))
            keys, values = self.codec.unraw(stored, mx.float32)
        else:
            slot = self._rng.integers(0, 1 << 32, (PAGE, words), dtype=np.uint32)
            packed = self.codec.pack(stored)
            slot[:rows] = np.array(packed)
            runs.append((len(self._slots), rows, False))
            self._slots.append(slot)
            keys, values = self.codec.unpack(packed, mx.float32)
        return runs, np.array(keys), np.array(values)

    def _sequence(self, i: int, length: int, pages: list, cut: bool) -> Reach:
        left = length - len(pages) * PAGE
        assert left > 0
        while left > PAGE or (cut and left > 9):
            rows = min(PAGE, left - 9) if cut else PAGE
            pages.append(self._page(not pages or not self.codec.format.packs, rows))
            left -= rows
        tail = self._rows(left)
        self._tails[i, :left] = np.array(tail)
        self._tails[i, left - 1] = 0xFFFFFFFF  # not stored yet: the step brings it along
        self.rows.append(np.array(tail)[-1])
        keys, values = self.codec.unraw(tail, mx.float32)
        self._fresh.append((keys[:, -1:], values[:, -1:]))
        self._keys.append(np.concatenate([*(p[1] for p in pages), np.array(keys)], axis=1))
        self._values.append(np.concatenate([*(p[2] for p in pages), np.array(values)], axis=1))
        self.tail_rows = [*getattr(self, "tail_rows", []), left]
        runs = [r for p in pages for r in p[0]]
        slots, rows_, raw = (np.array([r[k] for r in runs], np.int64) for k in range(3))
        return Reach(slots, rows_, raw.astype(bool), i)

    def expected(self, lows: Sequence[int] | None = None, sinks: np.ndarray | None = None) -> np.ndarray:
        """Attention of every query over its sequence's rows, float64 [B, H, 1, value_dim]."""
        repeat = self.heads // self.codec.shape.heads
        outs = []
        for i, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            low = lows[i] if lows is not None else 0
            k, v = (np.repeat(x[:, low:].astype(np.float64), repeat, axis=0) for x in (keys, values))
            q = np.array(self.queries[i, :, 0]).astype(np.float64)
            scores = np.einsum("hd,hsd->hs", q, k) * self.scale
            top = scores.max(1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(1, keepdims=True)
            if sinks is not None:
                total += np.exp(sinks[:, None] - top)
            outs.append(np.einsum("hs,hsd->hd", weights / total, v)[:, None])
        return np.stack(outs)
