"""What kinds of state a model keeps, layer by layer, found by looking at its caches and running it over one token.

| kind | what one layer keeps | where we keep it |
|---|---|---|
| `full` | keys and values of every token | rows in pages |
| `latent` | one compressed key and one rotary key of every token (multi-head latent attention) | rows in pages |
| `window` | keys and values of the last tokens | carried along with the sequence |
| `recurrent` | arrays of constant size | carried along with the sequence |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from agentmem.errors import ModelUnavailable
from agentmem.model.unsound import unsound
from agentmem.quant.format import LayerShape

Kind = Literal["full", "latent", "window", "recurrent"]

NO_SHAPE = LayerShape(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Part:
    """One cache of a model: `window` is how many tokens it looks back at, itself included; `arrays` those of a recurrent one."""

    kind: Kind
    shape: LayerShape = NO_SHAPE
    window: int = 0
    arrays: int = 0

    @property
    def carried(self) -> bool:
        return self.kind in ("window", "recurrent")


@dataclass(frozen=True, slots=True)
class Anatomy:
    """`parts` in the order of the model's caches, `nested` how many each of its layers has (None: one, not in a list).

    `query_heads` of the layers that attend, `dtype` that of keys.
    """

    parts: tuple[Part, ...]
    nested: tuple[int | None, ...]
    query_heads: int
    dtype: mx.Dtype

    @property
    def paged(self) -> tuple[Part, ...]:
        """Those that have rows in pages."""
        return tuple(p for p in self.parts if not p.carried)

    @property
    def shapes(self) -> list[LayerShape]:
        """Geometry of the layers that have rows in pages."""
        return [p.shape for p in self.paged]

    @property
    def carried(self) -> tuple[Part, ...]:
        return tuple(p for p in self.parts if p.carried)

    @property
    def plain(self) -> bool:
        """Whether all layers are of the kind `full`."""
        return all(p.kind == "full" for p in self.parts)

    def caches(self, paged: Sequence[Any], carried: Sequence[Any]) -> list[Any]:
        """What the model takes as its cache: ours, one of each list for each part of its kind."""
        if not self.carried and all(n is None for n in self.nested):
            return list(paged)
        rows, along = iter(paged), iter(carried)
        return nest([next(along) if p.carried else next(rows) for p in self.parts], self.nested)


def nest(leaves: Sequence[Any], nested: Sequence[int | None]) -> list[Any]:
    """One cache a layer, of which some are lists."""
    rest = iter(leaves)
    return [
        next(rest) if count is None else CacheList(*(next(rest) for _ in range(count))) for count in nested
    ]


def flattened(caches: Sequence[Any]) -> list[Any]:
    """Caches without the lists that some of them are."""
    return [leaf for c in caches for leaf in (c.caches if isinstance(c, CacheList) else (c,))]


def leaves(model: nn.Module) -> tuple[list[Any], tuple[int | None, ...]]:
    """The model's own caches, empty, and how they are nested."""
    caches: list[Any] = make_prompt_cache(model)
    nested = tuple(len(c.caches) if isinstance(c, CacheList) else None for c in caches)
    return flattened(caches), nested


SHARED = ModelUnavailable("layers of this model attend to the keys of other layers, which is not supported")


class Probe:
    """A cache that notes the geometry of one layer's attention, and whether the layer looks into what it holds."""

    def __init__(self, offset: int | mx.array = 0, handed_out: set[int] | None = None) -> None:
        self.offset, self._handed_out = offset, handed_out
        self.shape = NO_SHAPE
        self.query_heads = 0
        self.opaque = False
        self.windowed = False
        self.keys = self.values = mx.zeros((0,))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3])
        self.keys, self.values = keys, values
        if self._handed_out is not None:
            self._handed_out.add(id(keys))
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        raise SHARED

    def make_mask(
        self, n: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | None:
        self.windowed = window_size is not None
        return mx.tril(mx.ones((n, n), mx.bool_)) if return_array else None

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        self.query_heads = queries.shape[1]
        self.opaque = keys is self.keys and values is self.values
        mask = options["mask"] if isinstance(options["mask"], mx.array) else None
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=options["scale"], mask=mask)


_watched: set[int] | None = None


@contextmanager
def watched() -> Iterator[set[int]]:
    """While it is open, `check_own` knows the keys that probes have put into the set. Engine thread only."""
    global _watched
    _watched = set()
    try:
        yield _watched
    finally:
        _watched = None


def check_own(keys: mx.array) -> None:
    """A layer without a cache attends to `keys`. Raises ModelUnavailable when they are another layer's."""
    if _watched is not None and id(keys) in _watched:
        raise SHARED


def probes(model: nn.Module, make: Callable[[], Any] = Probe) -> tuple[list[Any], list[Any]]:
    """(caches for the model, those of them that `make` made): recurrent parts keep the model's own."""
    own, nested = leaves(model)
    mixed = [leaf if isinstance(leaf, ArraysCache) else make() for leaf in own]
    return nest(mixed, nested), [m for m, leaf in zip(mixed, own, strict=True) if m is not leaf]


def anatomy(model: nn.Module) -> Anatomy:
    """What the model keeps. Precondition: `seam.install` has seen it. Raises ModelUnavailable for what we do not know."""
    own, nested = leaves(model)
    unknown = sorted(
        {type(c).__name__ for c in own} - {c.__name__ for c in (KVCache, RotatingKVCache, ArraysCache)}
    )
    if unknown:
        raise ModelUnavailable(
            f"this model keeps state of the kind {', '.join(unknown)}, which is not supported"
        )
    if any(isinstance(c, RotatingKVCache) and c.keep for c in own):
        raise ModelUnavailable("this model keeps the first tokens of its windows, which is not supported")
    with unsound("this model does not run with our caches"), watched() as handed_out:
        caches, seen = probes(model, lambda: Probe(handed_out=handed_out))
        mx.eval(model(mx.array([[0]]), cache=caches))
    noted = iter(seen)
    parts = tuple(_part(c, None if isinstance(c, ArraysCache) else next(noted)) for c in own)
    heads = [p.query_heads for p in seen if p.query_heads]
    dtype = seen[0].keys.dtype if seen else _dtype(model)
    most = max((p.shape.heads for p in seen), default=1)
    return Anatomy(parts, nested, heads[0] if heads else most, dtype)


def _part(own: Any, seen: Probe | None) -> Part:
    if seen is None:
        return Part("recurrent", arrays=len(own.cache))
    if seen.shape == NO_SHAPE:
        raise ModelUnavailable("a layer of this model does not use its cache; it is not supported")
    if isinstance(own, RotatingKVCache):
        if not seen.opaque:
            raise ModelUnavailable("a window of this model is read by other means than mlx-lm's attention")
        return Part("window", seen.shape, window=own.max_size)
    if seen.windowed:
        raise ModelUnavailable(
            "a layer of this model hides tokens that its cache keeps, which is not supported"
        )
    return Part("full" if seen.opaque else "latent", seen.shape)


def _dtype(model: nn.Module) -> mx.Dtype:
    """The type of a model without attention: that of its first weights that are no codes."""
    weights: list[Any] = list(tree_flatten(model.parameters()))
    floats = [v.dtype for _, v in weights if mx.issubdtype(v.dtype, mx.floating)]
    return floats[0] if floats else mx.float32
