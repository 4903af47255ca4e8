"""A prompt that is put together from left to right: some of its tokens are read by the model, others bring their state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from agentmem.compose.rotation import Rotation, rotated
from agentmem.compose.state import State
from agentmem.model.network import Network
from agentmem.quant.attention import whole_attention


class Line:
    """One layer of the prompt: keys as the model rotated them, and values, [heads, n, dim] of the model's dtype.

    To the model it is a cache for one sequence.
    """

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[1])

    def append(self, keys: mx.array, values: mx.array) -> None:
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            self.keys = mx.concatenate([self.keys, keys], axis=1)
            self.values = mx.concatenate([self.values, values], axis=1)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, n: int, **_: Any) -> str | None:
        return "causal" if n > 1 else None

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:  # fmt: skip
        self.append(keys[0], values[0])
        assert self.keys is not None
        assert self.values is not None
        return whole_attention(queries, self.keys[None], self.values[None], scale=scale, sinks=sinks)


class Prompt:
    """The tokens so far with their state. `read_tokens` counts those that the model read."""

    def __init__(self, network: Network, rotations: Sequence[Rotation], dtype: mx.Dtype) -> None:
        self._network, self._rotations, self._dtype = network, rotations, dtype
        self.lines = [Line() for _ in rotations]
        self.ids: list[int] = []
        self.read_tokens = 0

    def __len__(self) -> int:
        return len(self.ids)

    def put(self, ids: Sequence[int], state: State) -> None:
        """Append tokens whose state is known."""
        assert len(ids) == len(state)
        turned = rotated(self._rotations, state.keys, len(self))
        for line, keys, values in zip(self.lines, turned, state.values, strict=True):
            line.append(keys.astype(self._dtype), values.astype(self._dtype))
        self.ids += ids

    def read(self, ids: Sequence[int]) -> mx.array:
        """Append tokens that the model reads behind all that is there; returns the logits [vocab] behind the last one."""
        logits = self._network.logits(mx.array([list(ids)], dtype=mx.int32), self.lines, [len(ids) - 1])
        mx.eval(logits, [line.keys for line in self.lines], [line.values for line in self.lines])
        self.ids += ids
        self.read_tokens += len(ids)
        return logits[0]

    def state(self, start: int, stop: int) -> State:
        """What tokens `start` to `stop` are in this prompt, in the canonical frame."""
        keys, values = [], []
        for line, rotation in zip(self.lines, self._rotations, strict=True):
            assert line.keys is not None
            assert line.values is not None
            keys.append(rotation.unrotate(line.keys[:, start:stop], start))
            values.append(line.values[:, start:stop])
        return State.of(keys, values)

    def copy(self) -> Prompt:
        """A prompt that goes on by itself; arrays are shared."""
        other = Prompt(self._network, self._rotations, self._dtype)
        for mine, theirs in zip(self.lines, other.lines, strict=True):
            theirs.keys, theirs.values = mine.keys, mine.values
        other.ids = list(self.ids)
        return other
