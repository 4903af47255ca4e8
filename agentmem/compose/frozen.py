"""Segments, fixed text and anchors as keepsakes, and back: bit for bit."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.blockpool.keepsake import Array, Keepsake, KeepsakeDamaged
from agentmem.compose.anchors import Anchor
from agentmem.compose.packed import PackedState
from agentmem.compose.segment import Fixed, Provenance, Segment
from agentmem.quant.format import LayerShape

_TYPES = {
    mx.uint8: "U8", mx.float16: "F16", mx.bfloat16: "BF16", mx.int32: "I32", mx.uint32: "U32", mx.float32: "F32",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}
PARTS = ("codes", "scales", "biases")


def frozen(x: mx.array) -> Array:
    """The bytes of an array, copied: they may go to another thread."""
    data = np.array(x.reshape(-1).view(mx.uint8)) if x.size else np.empty(0, np.uint8)
    return Array(_TYPES[x.dtype], tuple(x.shape), data)


def thawed(array: Array) -> mx.array:
    dtype = _DTYPES[array.dtype]
    flat = mx.array(array.data).view(dtype) if array.data.size else mx.zeros((0,), dtype)
    return flat.reshape(array.shape)


def segment_of(namespace: str, key: str, segment: Segment) -> Keepsake:
    said = {
        "namespace": namespace,
        "kind": segment.kind,
        "home": segment.home.hex(),
        "created": segment.created,
        "parents": [p.hex() for p in segment.provenance.parents],
        "hops": segment.provenance.hops,
    }
    return Keepsake(
        key, said | _about(segment.base), {"ids": _ids(segment.ids), **_arrays("base", segment.base)}
    )


def thawed_segment(kept: Keepsake, state: dict[str, Any]) -> Segment:
    about = kept.about
    provenance = Provenance(tuple(bytes.fromhex(p) for p in about["parents"]), about["hops"])
    return Segment(
        _thawed_ids(kept), _thawed("base", kept, about), bytes.fromhex(about["home"]), set(state["owners"]),
        state["hits"], state["used"], kind=about["kind"], provenance=provenance, created=about["created"],
    )  # fmt: skip


def fixed_of(namespace: str, key: str, chain: bytes, fixed: Fixed) -> Keepsake:
    said = {"namespace": namespace, "chain": chain.hex()}
    return Keepsake(key, said | _about(fixed.base), {"ids": _ids(fixed.ids), **_arrays("base", fixed.base)})


def thawed_fixed(kept: Keepsake, state: dict[str, Any]) -> Fixed:
    base = _thawed("base", kept, kept.about)
    return Fixed(_thawed_ids(kept), base, b"", set(state["owners"]), state["hits"], state["used"])


def anchor_of(slot: str, key: str, anchor: Anchor) -> Keepsake:
    consumers = list(anchor.offsets)
    states = {"base": anchor.base}
    for number, consumer in enumerate(consumers):
        states[f"slot{number}"], states[f"after{number}"] = anchor.offsets[consumer]
    about = {
        "slot": slot,
        "text": anchor.text.hex(),
        "consumers": consumers,
        "states": {name: _about(state) for name, state in states.items()},
    }
    return Keepsake(
        key, about, {k: a for name, state in states.items() for k, a in _arrays(name, state).items()}
    )


def thawed_anchor(kept: Keepsake, state: dict[str, Any]) -> Anchor:
    def packed(name: str) -> PackedState:
        return _thawed(name, kept, kept.about["states"][name])

    offsets = {
        consumer: (packed(f"slot{n}"), packed(f"after{n}"))
        for n, consumer in enumerate(kept.about["consumers"])
    }
    return Anchor(bytes.fromhex(kept.about["text"]), packed("base"), offsets, state["hits"])


def _about(base: PackedState) -> dict[str, Any]:
    return {"bits": base.bits, "shapes": [[s.heads, s.key_dim, s.value_dim] for s in base.shapes]}


def _arrays(name: str, packed: PackedState) -> dict[str, Array]:
    return {f"{name}.{part}": frozen(getattr(packed, part)) for part in PARTS}


def _thawed(name: str, kept: Keepsake, about: dict[str, Any]) -> PackedState:
    """Raises KeepsakeDamaged where the arrays are not those of a packed state."""
    try:
        codes, scales, biases = (thawed(kept.arrays[f"{name}.{part}"]) for part in PARTS)
    except KeyError as e:
        raise KeepsakeDamaged(f"{e} is not there") from e
    if not len(codes) == len(scales) == len(biases):
        raise KeepsakeDamaged("its arrays are of different lengths")
    return PackedState(codes, scales, biases, about["bits"], tuple(LayerShape(*s) for s in about["shapes"]))


def _ids(ids: np.ndarray) -> Array:
    return Array("I32", ids.shape, np.frombuffer(ids.astype("<i4").tobytes(), np.uint8))


def _thawed_ids(kept: Keepsake) -> np.ndarray:
    return np.frombuffer(kept.arrays["ids"].data.tobytes(), "<i4")
