"""How the state of a model is laid out: which layers have rows in pages and which are carried along, and the codec and the key
map of each, as a format asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from agentmem.blockpool.geometry import Geometry
from agentmem.engine.calibrate import calibration
from agentmem.engine.carry import Baggage
from agentmem.engine.windows import WindowLayer
from agentmem.model import seam
from agentmem.model.anatomy import Anatomy, Part, anatomy, flattened, probes
from agentmem.model.latent import keep_latents
from agentmem.model.loaded import LoadedModel
from agentmem.model.products import join_rows
from agentmem.model.progress import Progress, silent
from agentmem.model.recurrent import RecurrentLayer, recurrent_shapes
from agentmem.quant.calibration import spare_layers, wide_format
from agentmem.quant.format import Code, KVFormat, LayerShape, kv_formats, stored_dtype
from agentmem.quant.keymap import CalibratedMap, KeyMap
from agentmem.quant.rows import RowCodec

BLANK = RowCodec(LayerShape(1, 128, 128), KVFormat("fp16", None, None), mx.float16)
"""Rows of the tokens of a model that keeps none: something must lie in its pages."""
BLANK_PAGES = 2
"""Pages of such a model are so many times as long."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`calibration` is the digest of the values that keys are corrected by, None for formats without."""

    geometry: Geometry
    query_heads: int
    dtype: mx.Dtype
    calibration: str | None
    anatomy: Anatomy
    baggage: Baggage | None = None
    format: KVFormat = BLANK.format

    @property
    def codecs(self) -> list[RowCodec]:
        """The different codecs of the layers that have rows."""
        return list(dict.fromkeys(self.geometry.codecs)) if self.anatomy.paged else []

    @property
    def attends(self) -> bool:
        """Whether the layers that have rows leave attention to us."""
        return bool(self.anatomy.paged) and not self.geometry.latent

    @property
    def kinds(self) -> list[list[object]]:
        """What the fingerprint says of layers that are not plain attention."""
        windows = (
            [x.codec.format for x in self.baggage.layers if isinstance(x, WindowLayer)]
            if self.baggage
            else []
        )
        kinds: list[list[object]] = [[p.kind, p.window, p.arrays] for p in self.anatomy.parts]
        return [] if self.anatomy.plain else [*kinds, [str(f.identity()) for f in windows]]


def layout(
    model: LoadedModel,
    format_name: str,
    page_tokens: int,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Layout:
    """Puts our attention into the model and looks at its layers; `folder` keeps calibrations. `format_name`: see `kv_formats`.

    Raises ModelUnavailable for models that are not supported and ValueError for formats that do not fit.
    """
    seam.install(model.model)
    join_rows(model.model)
    keep_latents(model.model)
    found = anatomy(model.model)
    formats = kv_formats(format_name, len(found.parts))
    attending = [p for p in found.parts if p.kind != "recurrent"]
    chosen = [f for f, p in zip(formats, found.parts, strict=True) if p.kind != "recurrent"]
    stored = stored_dtype(found.dtype)
    codecs = [RowCodec(p.shape, part_format(f, p), stored) for f, p in zip(chosen, attending, strict=True)]
    maps: list[KeyMap] = [KeyMap(c.format.rotation) for c in codecs]
    digest = None
    if any(f.calibrated for f in chosen):
        mapped = [p.kind != "latent" for p in attending]
        values = calibration(
            model, found, [c for c, m in zip(codecs, mapped, strict=True) if m], folder, progress
        )
        layers = iter(values.layers)
        noises: dict[int, float] = {}
        for i in (i for i, m in enumerate(mapped) if m):
            layer = next(layers)
            if not chosen[i].calibrated:
                continue
            noises[i] = layer.noise
            maps[i] = CalibratedMap(layer.mean, layer.scale, found.dtype)
            if layer.wide and codecs[i].format.packs:
                codecs[i] = replace(codecs[i], format=wide_format(codecs[i].format))
        # Bits are those of a long context, of which windows hold little: they have spare bits of their own.
        for kind in {(chosen[i].name, attending[i].carried) for i in noises if chosen[i].spare_bits}:
            same = [i for i in noises if (chosen[i].name, attending[i].carried) == kind]
            for n in spare_layers([codecs[i] for i in same], [noises[i] for i in same]):
                i = same[n]
                codecs[i] = replace(codecs[i], format=wide_format(codecs[i].format, chosen[i].spare_bits))
        digest = values.digest
    paged = [i for i, p in enumerate(attending) if not p.carried]
    blank = not paged
    page_tokens *= BLANK_PAGES if blank else 1
    carried = _baggage(model, found, page_tokens, codecs, maps) if found.carried else None
    geometry = Geometry(
        (BLANK,) if blank else tuple(codecs[i] for i in paged), page_tokens,
        (KeyMap(),) if blank else tuple(maps[i] for i in paged),
        carried_words=carried.most_words() if carried is not None else 0,
        latent=frozenset(i for i, p in enumerate(found.paged) if p.kind == "latent"),
    )  # fmt: skip
    return Layout(geometry, found.query_heads, found.dtype, digest, found, carried, formats[0])


def part_format(format: KVFormat, part: Part) -> KVFormat:
    """The format of one layer. What a latent layer stores is read whole, in the model's own terms: nothing is turned, and the
    rotary key, which is small, gets 8 bits."""
    fitted = format.for_shape(part.shape)
    if part.kind != "latent" or fitted.keys is None or fitted.values is None:
        return fitted
    values = Code(max(8, fitted.values.bits), fitted.values.group)
    return KVFormat(fitted.name, fitted.keys, values, "none", fitted.raw_first_page)


def _baggage(
    model: LoadedModel, found: Anatomy, page_tokens: int, codecs: list[RowCodec], maps: list[KeyMap]
) -> Baggage:
    """The carried layers. Recurrent ones are looked at after a token."""
    caches, _ = probes(model.model)
    mx.eval(model.model(mx.array([[0]]), cache=caches))
    arrays = iter(recurrent_shapes([c for c in flattened(caches) if isinstance(c, ArraysCache)]))
    attending = iter(zip(codecs, maps, strict=True))
    layers: list[WindowLayer | RecurrentLayer] = []
    for part in found.parts:
        if part.kind == "recurrent":
            layers.append(RecurrentLayer(next(arrays)))
            continue
        codec, key_map = next(attending)
        if part.kind == "window":
            layers.append(WindowLayer(codec, key_map, part.window, page_tokens))
    return Baggage(tuple(layers), page_tokens)
