"""A tiny random model as a real MLX folder: a daemon on it starts without converting, and speaks in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from agentmem.model.random import BYTES, TINY, random_model

END_TOKEN = BYTES + 1
"""The one id that ends its replies; every byte is a token of its own."""


def save_model(folder: Path, architecture: str = "llama", **overrides: Any) -> Path:
    """Make `folder`, in the form that mlx-lm and transformers write. `overrides` go into the model's config."""
    folder.mkdir()
    made = random_model(architecture, seed=0, **overrides)
    weights: Any = dict(tree_flatten(made.model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(TINY | {"model_type": architecture} | overrides))
    made.tokenizer._tokenizer.save_pretrained(folder)
    return folder
