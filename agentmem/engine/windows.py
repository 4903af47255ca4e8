"""Layers that look back at a window of tokens only: their rows are carried along, and what leaves the window is let go of.

Rows are packed like those of pages, at the same tokens: the first page and what does not fill one stay raw. So it does not
matter when a checkpoint is taken, and none is packed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.engine.views import LayerCache
from agentmem.quant.attention import dequantised_history
from agentmem.quant.device import on_device
from agentmem.quant.keymap import KeyMap
from agentmem.quant.rows import RowCodec


@dataclass(frozen=True, slots=True)
class Extent:
    """Which tokens a window keeps behind `tokens` tokens: raw ones of the first page, packed ones, and those of the tail."""

    first: range
    packed: range
    tail: range


@dataclass(frozen=True, slots=True, eq=False)
class WindowLayer:
    """A token sees itself and the `window` - 1 before it."""

    codec: RowCodec
    key_map: KeyMap
    window: int
    page_tokens: int

    def extent(self, tokens: int) -> Extent:
        """What is kept behind `tokens` tokens: whole pages, as far as the next token sees any of them."""
        p = self.page_tokens
        begin = max(0, tokens - self.window + 1) // p * p
        tail = tokens // p * p
        if not self.codec.format.packs:
            return Extent(range(0), range(0), range(begin, tokens))
        raw_end = p if self.codec.format.raw_first_page and begin == 0 else begin
        raw_end = min(raw_end, tail)
        return Extent(
            range(begin, max(begin, raw_end)), range(max(begin, raw_end), tail), range(tail, tokens)
        )

    def empty(self) -> WindowState:
        """Before the first token."""
        nothing = mx.zeros((0, self.codec.raw_words), mx.uint32)
        return WindowState(self, 0, nothing, mx.zeros((0, self.codec.packed_words), mx.uint32), nothing)

    def words(self, tokens: int) -> int:
        """Words of a checkpoint behind `tokens` tokens."""
        kept = self.extent(tokens)
        raw = len(kept.first) + len(kept.tail)
        return raw * self.codec.raw_words + len(kept.packed) * self.codec.packed_words

    def most_words(self) -> int:
        p, codec = self.page_tokens, self.codec
        if not codec.format.packs:
            return (self.window + p) * codec.raw_words
        return 2 * p * codec.raw_words + (self.window + p) * codec.packed_words

    def unpacked(self, words: mx.array, tokens: int) -> WindowState:
        """What `WindowState.packed` made behind `tokens` tokens."""
        kept, parts, at = self.extent(tokens), [], 0
        for part, width in zip(
            (kept.first, kept.packed, kept.tail),
            (self.codec.raw_words, self.codec.packed_words, self.codec.raw_words),
            strict=True,
        ):
            parts.append(words[at : at + len(part) * width].reshape(len(part), width))
            at += len(part) * width
        return WindowState(self, tokens, *parts)


@dataclass(frozen=True, slots=True, eq=False)
class WindowState:
    """The rows that one layer keeps behind `tokens` tokens of one sequence, uint32 [n, words] each; see `Extent`."""

    layer: WindowLayer
    tokens: int
    first: mx.array
    middle: mx.array
    tail: mx.array

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.first, self.middle, self.tail) if a.size]

    def packed(self) -> mx.array:
        """uint32 [words], lazily."""
        return mx.concatenate([a.reshape(-1) for a in (self.first, self.middle, self.tail)])

    def view(self, window: WindowPass) -> WindowView:
        return WindowView(self, window)

    def after(self, rows: mx.array, n: int) -> WindowState:
        """With the raw rows of `n` more tokens, uint32 [n, raw_words]: full pages are packed, what is out of sight goes."""
        layer = self.layer
        old, new = layer.extent(self.tokens), layer.extent(self.tokens + n)
        raw = mx.concatenate([self.tail, rows])  # tokens from old.tail.start on
        start = old.tail.start
        first = raw[: len(new.first)] if start == 0 and len(new.first) else self.first[: len(new.first)]
        middle = self.middle
        if layer.codec.format.packs:
            sealed = range(max(start, new.packed.start), new.packed.stop)
            if len(sealed):
                fresh = layer.codec.pack(raw[sealed.start - start : sealed.stop - start])
                middle = mx.concatenate([middle, fresh]) if middle.size else fresh
            middle = middle[middle.shape[0] - len(new.packed) :]
        return WindowState(layer, self.tokens + n, first, middle, raw[new.tail.start - start :])

    def history(self, dtype: mx.Dtype) -> tuple[list[mx.array], list[mx.array]]:
        """Keys and values of all rows that are kept, in the order of `positions`."""
        middle = self.middle if self.middle.shape[0] else None
        return dequantised_history(self.layer.codec, [self.first, self.tail], middle, dtype)

    def positions(self) -> np.ndarray:
        """Which tokens `history` has the rows of."""
        kept = self.layer.extent(self.tokens)
        return np.concatenate([np.array(part, np.int64) for part in (kept.first, kept.tail, kept.packed)])


class WindowPass:
    """What the windows of one pass over one sequence share: masks. Layers of equal windows have one."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._masks: dict[tuple[int, int], mx.array | None] = {}

    def mask(self, state: WindowState, n: int) -> mx.array | None:
        """Which of the rows that are kept, and of the pass, each of its `n` tokens sees: bool [n, rows + n]; None: all."""
        key = state.layer.window, n
        if key not in self._masks:
            own = np.arange(self.tokens, self.tokens + n)
            keys = np.concatenate([state.positions(), own])
            apart = own[:, None] - keys[None]
            seen = (apart >= 0) & (apart < state.layer.window)
            self._masks[key] = None if seen.all() else on_device(seen)
        return self._masks[key]


def _attend(
    state: WindowState, window: WindowPass, queries: mx.array, keys: mx.array, values: mx.array, scale: float,
    sinks: mx.array | None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """(output [1, H, n, D], the rows of the pass uint32 [n, raw_words]) of one sequence's pass."""
    old_keys, old_values = state.history(keys.dtype)
    all_keys = mx.concatenate([*(k[None] for k in old_keys), keys], axis=2) if old_keys else keys
    all_values = mx.concatenate([*(v[None] for v in old_values), values], axis=2) if old_values else values
    mask = window.mask(state, queries.shape[2])
    out = mx.fast.scaled_dot_product_attention(
        queries, all_keys, all_values, scale=scale, mask=mask, sinks=sinks
    )
    return out, state.layer.codec.raw(keys[0], values[0])


class WindowCache(LayerCache):
    """Masks are made in `attend`, from what is kept."""

    def make_mask(self, n: int, window_size: int | None = None, return_array: bool = False) -> str | None:
        return "causal" if n > 1 else None


class WindowView(WindowCache):
    """A window's cache for a pass over one sequence."""

    def __init__(self, state: WindowState, window: WindowPass) -> None:
        super().__init__(state.tokens, state.layer.key_map)
        self.state, self._window = state, window
        self._rows: mx.array | None = None

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        out, self._rows = _attend(self.state, self._window, queries, keys, values, scale, sinks)
        return out

    def rows(self) -> mx.array:
        """The rows of the pass, uint32 [n, raw_words]. Precondition: the model ran."""
        assert self._rows is not None
        return self._rows


class BatchWindowView(WindowCache):
    """A window's cache for one decode step of several sequences."""

    def __init__(self, states: Sequence[WindowState], passes: Sequence[WindowPass]) -> None:
        lengths = [s.tokens for s in states]
        offset: Any = lengths[0] if len(lengths) == 1 else on_device(np.array(lengths, np.int32))
        super().__init__(offset, states[0].layer.key_map)
        self._states, self._passes = states, passes
        self._rows: list[mx.array] = []

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        outs = []
        for b, (state, window) in enumerate(zip(self._states, self._passes, strict=True)):
            q, k, v = (x[b : b + 1] for x in (queries, keys, values))
            out, rows = _attend(state, window, q, k, v, scale, sinks)
            outs.append(out)
            self._rows.append(rows)
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)

    def after(self) -> list[WindowState]:
        """The states behind the step. Precondition: the model ran."""
        return [state.after(rows, 1) for state, rows in zip(self._states, self._rows, strict=True)]
