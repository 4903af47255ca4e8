"""From the name of a model to the model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from agentmem.errors import ModelUnavailable
from agentmem.home import Home
from agentmem.model import embedded, hub
from agentmem.model.chat import ChatTokenizer
from agentmem.model.convert import converted
from agentmem.model.folder import Folder
from agentmem.model.identity import HashCache
from agentmem.model.progress import Progress, silent

__all__ = ["LoadedModel", "Progress", "load"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, on the thread that loaded it.

    `name` is the public id. `model(tokens[B, T], cache=[...])` gives logits. `identity` is the model part of
    a cache's fingerprint. `dtype` is what the model computes in, `max_context` is in tokens.
    """

    name: str
    model: nn.Module
    tokenizer: ChatTokenizer
    identity: dict[str, str]
    dtype: mx.Dtype
    max_context: int


def load(spec: str, home: Path, progress: Progress | None = None) -> LoadedModel:
    """Load "embedded", an MLX model folder, a .gguf file, or "org/name" of the Hugging Face hub.

    Must run on the thread that will run the model. Raises ModelUnavailable with what to do about it.
    """
    report = progress or silent
    models = Home(home).models
    name, path = _locate(spec, models, report)
    folder = Folder.open(path)
    tokenizer = folder.load_tokenizer()
    identity = folder.identity(tokenizer, HashCache(models / "hashes.json"), report)
    model, dtype = folder.load_model(report)
    return LoadedModel(name, model, tokenizer, identity, dtype, folder.max_context())


def _locate(spec: str, models: Path, progress: Progress) -> tuple[str, Path]:
    """Public name and MLX folder of what `spec` names."""
    if spec == "embedded":
        return embedded.NAME, embedded.embedded_folder(models, progress)
    path = Path(spec).expanduser()
    if path.is_dir():
        return path.resolve().name, path
    if path.is_file():
        return _from_gguf(path, models, progress)
    if hub.is_repository(spec):
        return spec, hub.hub_folder(spec, models, progress)
    raise ModelUnavailable(
        f"There is no model {spec!r}: name 'embedded', an MLX model folder, a .gguf file, "
        "or a model of the Hugging Face hub (org/name)"
    )


def _from_gguf(path: Path, models: Path, progress: Progress) -> tuple[str, Path]:
    if path.suffix != ".gguf":
        raise ModelUnavailable(f"{path} is neither an MLX model folder nor a .gguf file")
    sha256 = HashCache(models / "hashes.json").sha256(path, progress)
    return path.stem.lower(), converted(path, sha256, models / f"gguf-{sha256[:16]}", progress)
