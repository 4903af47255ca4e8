"""Tiny models whose heads share keys, and caches over them, for the tests of an episode's state."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from agentmem.episode.held import Held
from agentmem.episode.rows import LayerKind, kinds_of, whole_kinds
from agentmem.episode.selection import Heads
from agentmem.episode.store import MemoryStore
from agentmem.model import seam
from agentmem.model.anatomy import anatomy
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network
from agentmem.model.random import random_model
from agentmem.quant.format import kv_format
from agentmem.quant.keymap import KeyMap
from agentmem.quant.rows import RowCodec

BOTH = (Heads.UNIFORM, Heads.RAGGED)


@dataclass
class World:
    """A model of 3 layers, 4 query heads and 2 KV heads."""

    model: LoadedModel
    network: Network
    kinds: dict[str, list[LayerKind]]

    def held(self, format: str = "whole", sinks: int = 4) -> Held:
        return Held.empty(self.network, self.kinds[format], self.model.dtype, sinks)

    def read(self, ids: list[int], format: str = "whole", sinks: int = 4) -> Held:
        held = self.held(format, sinks)
        held.absorb(ids)
        return held

    def store(self, ids: list[int], format: str = "whole") -> MemoryStore:
        return MemoryStore(self.read(ids, format))

    def logits(self, ids: list[int]) -> mx.array:
        """Of every token, by mlx-lm itself."""
        return self.model.model(mx.array([ids]))[0]


def world_of(architecture: str = "llama") -> World:
    model = random_model(architecture, seed=3, num_hidden_layers=3)
    seam.install(model.model)
    found = anatomy(model.model)
    shapes, dtype = found.shapes, found.dtype
    kinds = {"whole": whole_kinds(shapes, dtype)}
    for name in ("q4-plain", "q4-rotated", "k8v4-plain", "fp16"):
        format = kv_format(name)
        codecs = [RowCodec(s, format.for_shape(s), mx.float16) for s in shapes]
        kinds[name] = kinds_of(codecs, [KeyMap(format.rotation)] * len(shapes))
    return World(model, Network(model.model), kinds)


def text(length: int, seed: int = 0) -> list[int]:
    """Token ids without any order."""
    return [int(i) for i in np.random.default_rng(seed).integers(0, 250, length)]


def same(one: Held, other: Held) -> bool:
    """Whether two caches are the same, bit for bit."""
    (a, x), (b, y) = one.arrays(), other.arrays()
    return x == y and a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)
