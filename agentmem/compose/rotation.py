"""RoPE undone and done again: keys in the canonical frame, in which a segment has no position.

Keys are stored un-rotated and rotated where they are used. Both steps take the positions that the model's own rotation was
given, so that its rounding cancels: at position 32,000 an angle in float32 is off by up to 1e-3, and a rotation by the
difference of two positions would keep that error of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from agentmem.errors import ModelUnavailable
from agentmem.model import seam

TRIED_AT = (1, 77, 4096)
"""Positions at which a model's keys are compared with keys that were rotated here."""
TOLERANCE = {mx.float32: 1e-4, mx.float16: 5e-3}
"""Largest difference against the largest key, by the type that the model computes in."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """What the RoPE of one layer does to a key behind its factor (YaRN's mscale), which stays in the key.

    The first `dims` elements turn, as neighbours (`traditional`) or as halves. Angles are position * scale / base^(2i/dims), or
    position / freqs[i] where there are `freqs`. `dims` of 0: the layer knows no positions.
    """

    dims: int
    traditional: bool = False
    base: float | None = None
    scale: float = 1.0
    freqs: mx.array | None = None

    def rotate(self, keys: mx.array, start: int | mx.array) -> mx.array:
        """Canonical keys [heads, n, dim] -> keys at the positions from `start` on, or at `start` int32 [n]; float32."""
        return self._turn(keys, start, back=False)

    def unrotate(self, keys: mx.array, start: int | mx.array) -> mx.array:
        """The inverse of `rotate`."""
        return self._turn(keys, start, back=True)

    def _turn(self, keys: mx.array, start: int | mx.array, *, back: bool) -> mx.array:
        keys = keys.astype(mx.float32)
        if self.dims == 0:
            return keys
        if isinstance(start, int):
            return self._rope(keys[None], start, back)[0]
        each = keys.transpose(1, 0, 2)[:, :, None]  # one key is one row of a batch, each at its own offset
        return self._rope(each, start, back)[:, :, 0].transpose(1, 0, 2)

    def _rope(self, keys: mx.array, offset: int | mx.array, back: bool) -> mx.array:
        sign = -1.0 if back else 1.0
        freqs = None if self.freqs is None else sign * self.freqs
        return mx.fast.rope(
            keys, self.dims, traditional=self.traditional, base=self.base, offset=offset, freqs=freqs,
            scale=self.scale if freqs is not None else sign * self.scale,
        )  # fmt: skip


def rotated(rotations: Sequence[Rotation], keys: Sequence[mx.array], start: int) -> list[mx.array]:
    """`rotate` of each layer's keys; those of layers that turn alike in one go, which takes a fraction of the calls."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for layer, (own, k) in enumerate(zip(rotations, keys, strict=True)):
        kind = (own.dims, own.traditional, own.base, own.scale, id(own.freqs), k.shape, k.dtype)
        alike.setdefault(kind, []).append(layer)
    out = list(keys)
    for layers in alike.values():
        together = mx.concatenate([keys[layer] for layer in layers])
        turned = rotations[layers[0]].rotate(together, start)
        for layer, part in zip(layers, mx.split(turned, len(layers)), strict=True):
            out[layer] = part
    return out


def rotation(rope: Any) -> Rotation:
    """The rotation of one of mlx-lm's RoPE modules.

    Raises ModelUnavailable for RoPE whose angles depend on the length of the prompt: its keys have no canonical frame.
    """
    kind = type(rope).__name__
    if "DynamicNTKScaling" in kind:
        raise ModelUnavailable(
            "this model's positions depend on the prompt's length: its state cannot be composed"
        )
    if isinstance(rope, nn.RoPE):
        return Rotation(rope.dims, rope.traditional, rope.base, rope.scale)
    freqs = getattr(rope, "_freqs", None)
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    if freqs is None or dims is None:
        raise ModelUnavailable(f"positions by {kind} are not known: state of this model cannot be composed")
    return Rotation(dims, getattr(rope, "traditional", False), freqs=freqs)


def rotations(model: nn.Module) -> list[Rotation]:
    """The rotation of every layer, tried against the model's own keys. Precondition: `seam.install` has seen the model.

    Raises ModelUnavailable where the two differ.
    """
    found = _sharing([_of_layer(layer) for layer in model.layers])
    # One token alone attends to itself wherever it stands: all that its position changes is the rotation of its keys.
    still = seam.keys_at(model, [[0]], 0)
    if len(still) != len(found):
        raise ModelUnavailable("this model has keys that no layer makes alone: its state cannot be composed")
    for position in TRIED_AT:
        for own, there, turned in zip(found, still, seam.keys_at(model, [[0]], position), strict=True):
            tolerance = TOLERANCE.get(turned.dtype, 2e-2) * mx.abs(turned).max()
            if (mx.abs(own.rotate(there[0], position) - turned[0]).max() > tolerance).item():
                raise ModelUnavailable(
                    "this model places its keys in an unknown way: its state cannot be composed"
                )
    return found


def _sharing(found: Sequence[Rotation]) -> list[Rotation]:
    """The same, with one array for all equal `freqs`."""
    seen: list[mx.array] = []
    out = []
    for own in found:
        if own.freqs is None:
            out.append(own)
            continue
        same = next((f for f in seen if f.shape == own.freqs.shape and mx.array_equal(f, own.freqs)), None)
        if same is None:
            seen.append(own.freqs)
        out.append(own if same is None else replace(own, freqs=same))
    return out


def _of_layer(layer: nn.Module) -> Rotation:
    """A layer without a RoPE of its own knows no positions."""
    ropes = {id(m): m for _, m in layer.named_modules() if not m.children() and _is_rope(m)}
    if len(ropes) > 1:
        raise ModelUnavailable(
            "a layer of this model has several rotary embeddings: its state cannot be composed"
        )
    return rotation(next(iter(ropes.values()))) if ropes else Rotation(0)


def _is_rope(module: nn.Module) -> bool:
    return any(word in type(module).__name__.lower() for word in ("rope", "rotary"))
