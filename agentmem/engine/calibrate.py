"""Calibrating a model: it reads one short text, and what that says of its keys decides how they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from agentmem.model.anatomy import Anatomy, probes
from agentmem.model.calibration_file import CalibrationFile
from agentmem.model.loaded import LoadedModel
from agentmem.model.progress import Progress, silent
from agentmem.quant.calibration import Calibration, Correction, corrected
from agentmem.quant.format import Code
from agentmem.quant.rows import RowCodec

TOKENS = 512
POSITIONS = (0, 720, 2160, 5040)
"""Where the pieces of the text are read: keys turn with their position, and a mean over the first ones fits no others."""
SINK = 16
"""Leading tokens of a piece that do not count: attention's sink is kept in 16 bits."""


def calibration(
    model: LoadedModel,
    found: Anatomy,
    codecs: Sequence[RowCodec],
    folder: Path | None,
    progress: Progress = silent,
) -> Calibration:
    """The model's calibration, from its file in `folder` or made and kept there; None keeps nothing.

    `codecs` are those of the layers in which we attend. Precondition: `seam.install` has seen the model.
    """
    if folder is None:
        return calibrated(model, found, codecs)
    shapes = [codec.shape for codec in codecs]
    packing = [[str(codec.shape), str(codec.format.keys), str(codec.stored)] for codec in codecs]
    file = CalibrationFile(folder, model.identity, [str(model.dtype), packing])
    kept = file.read(shapes)
    if kept is None:
        progress("calibrating the KV format", None)
        kept = calibrated(model, found, codecs)
        file.write(kept)
    return kept


class Observed:
    """A cache that notes the queries, keys and values [1, heads, n, dim] of one layer, at positions from `offset` on."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.scale = 1.0
        self.queries = self.keys = self.values = mx.zeros((0,))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, n: int, return_array: bool = False, **_: Any) -> mx.array | str:
        return create_causal_mask(n) if return_array else "causal"

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:  # fmt: skip
        self.queries, self.keys, self.values, self.scale = queries, keys, values, scale
        mask = mask if isinstance(mask, mx.array) else "causal"
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )


def calibrated(model: LoadedModel, found: Anatomy, codecs: Sequence[RowCodec]) -> Calibration:
    """Read the text and measure; takes as long as a prompt of `TOKENS` tokens."""
    pieces = [_observe(model, found, ids, at) for ids, at in _pieces(model)]
    layers: list[Correction] = []
    for codec, *seen in zip(codecs, *pieces, strict=True):
        code = codec.format.keys or Code(8, 64)  # of a layer that is not packed, whose values nobody uses
        layers.append(
            corrected(
                mx.concatenate([s.keys[0, :, SINK:] for s in seen], axis=1),
                mx.concatenate([s.queries[0, :, SINK:] for s in seen], axis=1),
                scale=seen[0].scale, code=code, stored=codec.stored,
            )
        )  # fmt: skip
    return Calibration(tuple(layers))


def _pieces(model: LoadedModel) -> list[tuple[list[int], int]]:
    """The text's token ids in as many pieces as there are positions, and where each begins."""
    text = resources.files("agentmem.model").joinpath("calibration.txt").read_text(encoding="utf-8")
    ids = model.tokenizer.encode(text)[:TOKENS]
    n = len(ids) // len(POSITIONS)
    last = max(0, model.max_context - n)
    return [(ids[i * n : (i + 1) * n], min(at, last)) for i, at in enumerate(POSITIONS)]


def _observe(model: LoadedModel, found: Anatomy, ids: list[int], offset: int) -> list[Observed]:
    """One pass over `ids`, of which nothing but queries and keys is computed."""
    caches, seen = probes(model.model, lambda: Observed(offset))
    model.model(mx.array([ids]), cache=caches)
    attending = [
        s
        for s, p in zip(seen, (p for p in found.parts if p.kind != "recurrent"), strict=True)
        if p.kind != "latent"
    ]
    mx.eval([(s.queries, s.keys) for s in attending])
    return attending
