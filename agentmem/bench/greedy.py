"""Greedy answers of many prompts at once: one token of each a step, over states of different lengths."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.model.network import Network

Layers = Sequence[tuple[mx.array, mx.array]]
"""Keys, rotated, and values [heads, n, dim] of each layer."""


class Together:
    """One layer of several prompts, as a cache: rows of prompt b behind `lengths[b]` are room.

    keys, values [prompts, heads, room, dim].
    """

    def __init__(self, each: Sequence[tuple[mx.array, mx.array]], room: int) -> None:
        self.keys, self.values = (
            mx.stack([mx.pad(x, [(0, 0), (0, room - x.shape[1]), (0, 0)]) for x in part])
            for part in zip(*each, strict=True)
        )
        self.lengths = mx.array([k.shape[1] for k, _ in each], dtype=mx.int32)

    @property
    def offset(self) -> mx.array:
        return self.lengths

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, n: int, **_: Any) -> None:
        assert n == 1

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:  # fmt: skip
        prompts = mx.arange(len(self.lengths))
        self.keys[prompts, :, self.lengths] = keys[:, :, 0]
        self.values[prompts, :, self.lengths] = values[:, :, 0]
        visible = mx.arange(self.keys.shape[2])[None] <= self.lengths[:, None]
        self.lengths = self.lengths + 1
        return mx.fast.scaled_dot_product_attention(
            queries, self.keys, self.values, scale=scale, mask=visible[:, None, None], sinks=sinks
        )


def answers(
    network: Network, prompts: Sequence[Layers], last: Sequence[int], tokens: int, ends: Collection[int]
) -> list[tuple[list[int], list[tuple[mx.array, mx.array]]]]:
    """Of each prompt: up to `tokens` tokens of its answer, an end not counted, and the state of these tokens.

    prompts: the state of all but the `last` token of each, which is read here.
    """
    room = max(layers[0][0].shape[1] for layers in prompts) + 1 + tokens
    lines = [Together(each, room) for each in zip(*prompts, strict=True)]
    starts = [layers[0][0].shape[1] + 1 for layers in prompts]
    said: list[list[int]] = [[] for _ in prompts]
    fed, done = list(last), [False] * len(prompts)
    for step in range(tokens + 1):
        logits = network.logits(mx.array(fed, dtype=mx.int32)[:, None], lines, range(len(prompts)))
        mx.eval(logits, [line.keys for line in lines], [line.values for line in lines])
        fed = [int(t) for t in np.array(logits.astype(mx.float32)).argmax(axis=1)]
        for number, token in enumerate(fed):
            done[number] = done[number] or (token in ends and step > 0) or step == tokens
            if not done[number]:
                said[number].append(token)
        if all(done):
            break
    return [
        (
            ids,
            [(line.keys[b, :, at : at + len(ids)], line.values[b, :, at : at + len(ids)]) for line in lines],
        )
        for b, (ids, at) in enumerate(zip(said, starts, strict=True))
    ]
