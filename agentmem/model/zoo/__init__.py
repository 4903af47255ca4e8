"""Overrides with which `random_model` makes a tiny model of each of mlx-lm's architectures."""

from __future__ import annotations

from typing import Any

from agentmem.model.zoo.dense import DENSE
from agentmem.model.zoo.experts import MOE
from agentmem.model.zoo.hybrid import HYBRIDS
from agentmem.model.zoo.latent import MLA
from agentmem.model.zoo.windows import WINDOWS
from agentmem.model.zoo.wrapped import WRAPPED

ZOO: dict[str, dict[str, Any]] = DENSE | MOE | WINDOWS | MLA | HYBRIDS | WRAPPED
NOT_RUN: dict[str, str] = {
    "bitnet": "its linear layers are a Metal kernel, there is none for the CPU",
    "muse_spark": "its queries and keys are rotated by a Metal kernel, there is none for the CPU",
    "olmo": "its file ends the process unless the package ai2-olmo is installed",
    "prism_hadamard_qwen35": "its weights exist only packed in 2 bits; its layers are those of qwen3_5",
    "phi3small": "writes to the logits of ids 100256 to 100351, outside of a small vocabulary (and of its memory)",
}
# Without a cache, these compute something else: layers that share another's keys then make their own.
CACHED_ONLY = frozenset({"gemma3n"})
# Their windows: the mask shows one token more than the cache keeps, so what they compute depends on how they are read.
ONE_SHORT = frozenset({"plamo3"})
