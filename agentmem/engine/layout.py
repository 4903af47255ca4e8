"""How the state of a model is laid out: the codec and the key map of every layer, as a format asks for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from agentmem.blockpool.geometry import Geometry
from agentmem.engine.calibrate import calibration
from agentmem.model import seam
from agentmem.model.loaded import LoadedModel
from agentmem.model.products import join_rows
from agentmem.model.progress import Progress, silent
from agentmem.quant.calibration import wide_format
from agentmem.quant.format import kv_format, stored_dtype
from agentmem.quant.keymap import CalibratedMap
from agentmem.quant.rows import RowCodec


@dataclass(frozen=True, slots=True)
class Layout:
    """`calibration` is the digest of the values that keys are corrected by, None for formats without."""

    geometry: Geometry
    query_heads: int
    dtype: mx.Dtype
    calibration: str | None

    @property
    def codecs(self) -> list[RowCodec]:
        """The different codecs of the layers."""
        return list(dict.fromkeys(self.geometry.codecs))


def layout(
    model: LoadedModel,
    format_name: str,
    page_tokens: int,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Layout:
    """Puts our attention into the model and looks at its layers; `folder` keeps calibrations.

    Raises ModelUnavailable for models that are not supported and ValueError for formats that do not fit.
    """
    seam.install(model.model)
    join_rows(model.model)
    shapes, query_heads, dtype = seam.probe(model.model)
    format = kv_format(format_name)
    codecs = [RowCodec(s, format.for_shape(s), stored_dtype(dtype)) for s in shapes]
    if not format.calibrated:
        return Layout(Geometry(tuple(codecs), page_tokens), query_heads, dtype, None)
    values = calibration(model, codecs, folder, progress)
    codecs = [
        replace(codec, format=wide_format(codec.format)) if layer.wide else codec
        for codec, layer in zip(codecs, values.layers, strict=True)
    ]
    maps = tuple(CalibratedMap(layer.mean, layer.scale, dtype) for layer in values.layers)
    return Layout(Geometry(tuple(codecs), page_tokens, maps), query_heads, dtype, values.digest)
