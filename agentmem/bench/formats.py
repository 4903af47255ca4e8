"""`bench formats`: what each KV format costs the model's predictions.

The first tokens of a text are held in a format, and the next ones are predicted over them, the text's own tokens fed. Compared
are the predictions of a run whose keys and values are not packed at all. What is held is the same keys and values for every
format: those of that run. Beside them stand schemes that quantise a page at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.bench.checks import check
from agentmem.bench.held import held, log_p
from agentmem.bench.pagewise import SCHEMES, Paged
from agentmem.engine.calibrate import Observed
from agentmem.engine.layout import Layout, layout
from agentmem.model.loaded import LoadedModel
from agentmem.quant.device import backend

Say = Callable[[str], None]

FORMATS = ("q4", "q4-plain", "q4-rotated", "q3", "k5v3", "k8v4-plain", "q8-plain", "fp16")
PAGE = 64


class Reading:
    """One text, read without packing: `layers` hold keys and values, `wanted` is log p [fed, vocab] of the last tokens."""

    def __init__(self, model: LoadedModel, ids: Sequence[int], history: int) -> None:
        self._model, self._ids, self._history = model, list(ids), history
        self.layers = [Observed() for _ in model.model.layers]
        logits = model.model(mx.array([self._ids]), cache=self.layers)
        self.wanted = log_p(logits[0, history:])
        mx.eval(self.wanted, [(x.keys, x.values) for x in self.layers])

    def again(self, plan: Layout) -> mx.array:
        """The same predictions over a history that is held as `plan` says."""
        n = self._history
        layers = [(layer.keys[0, :, :n], layer.values[0, :, :n]) for layer in self.layers]
        table = held(plan, self._ids[:n], layers, len(self._ids))
        got = log_p(self._model.model(mx.array([self._ids[self._history :]]), cache=table.views())[0])
        mx.eval(got)
        table.release()
        return got

    def paged(self, scheme: Paged) -> mx.array:
        """The same over a history that is quantised page by page."""
        n = self._history
        caches = [scheme.behind(layer.keys[:, :, :n], layer.values[:, :, :n]) for layer in self.layers]
        got = log_p(self._model.model(mx.array([self._ids[n:]]), cache=caches)[0])
        mx.eval(got)
        return got


def run(
    model: LoadedModel, names: Sequence[str], texts: Mapping[str, str], *, history: int, fed: int,
    calibrations: Path | None, say: Say, schemes: Sequence[Paged] = SCHEMES,
) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark. Texts that are shorter than `history + fed` tokens are refused with ValueError."""
    plans = {name: layout(model, name, PAGE, calibrations) for name in names}
    bits = {name: _bits(plan) for name, plan in plans.items()} | {s.name: s.bits for s in schemes}
    divergence: dict[str, list[np.ndarray]] = {name: [] for name in bits}
    agreement: dict[str, list[np.ndarray]] = {name: [] for name in bits}
    for title, text in texts.items():
        ids = model.tokenizer.encode(text)[: history + fed]
        if len(ids) < history + fed:
            raise ValueError(f"{title} has {len(ids)} tokens; {history + fed} are needed")
        reading = Reading(model, ids, history)
        ways = {name: partial(reading.again, plan) for name, plan in plans.items()}
        ways |= {scheme.name: partial(reading.paged, scheme) for scheme in schemes}
        for name, predict in ways.items():
            got = predict()
            lost = (mx.exp(reading.wanted) * (reading.wanted - got)).sum(-1)
            divergence[name].append(np.array(lost))
            agreement[name].append(np.array(reading.wanted.argmax(-1) == got.argmax(-1)))
            say(f"{title}: {name} {divergence[name][-1].mean():.4f}")
    rows = [_row(name, bits[name], divergence[name], agreement[name]) for name in bits]
    return {
        "schema_version": 1,
        "model": model.name,
        "backend": backend(),
        "texts": list(texts),
        "history": history,
        "fed": fed,
        "rows": rows,
        "checks": checks(rows),
    }


def _bits(plan: Layout) -> float:
    """Of an element far from the first page, scales and biases included."""
    return 16 * plan.geometry.packed_row_bytes / plan.geometry.raw_row_bytes


def _row(name: str, bits: float, divergence: list[np.ndarray], agreement: list[np.ndarray]) -> dict[str, Any]:
    lost = np.concatenate(divergence)
    return {
        "format": name,
        "bits": bits,
        "kl": float(lost.mean()),
        "kl_p95": float(np.percentile(lost, 95)),
        "kl_texts": [float(x.mean()) for x in divergence],
        "top1": float(np.concatenate(agreement).mean()),
    }


def checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is promised of the default format."""
    kl = {row["format"]: row["kl"] for row in rows}
    if not {"q4", "q4-plain"} <= kl.keys() or kl["q4-plain"] == 0:
        return []
    return [check("mean KL of q4 / of q4-plain", kl["q4"] / kl["q4-plain"], 0.5, "ratio", True)]
