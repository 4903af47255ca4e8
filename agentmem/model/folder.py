"""A local MLX model folder, loaded through mlx-lm. No code from the folder is ever run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx_lm import utils as mlx_lm_utils

from agentmem.errors import ModelUnavailable
from agentmem.model.chat import ChatTokenizer
from agentmem.model.identity import HashCache, digest, rope_part
from agentmem.model.progress import Progress
from agentmem.model.unsound import unsound

DEFAULT_CONTEXT = 4096
"""Tokens, for models whose config names no limit."""
MEMORY_SHARE = 0.9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True, slots=True)
class Folder:
    """A checked model folder."""

    path: Path
    config: dict[str, Any]
    weights: list[Path]

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Raises ModelUnavailable, naming what is missing or unsound."""
        config_file = path / "config.json"
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelUnavailable(f"{path} is no MLX model folder: it has no config.json") from error
        except (OSError, ValueError) as error:
            raise ModelUnavailable(f"{config_file} cannot be read: {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            raise ModelUnavailable(f"{config_file} names no model_type")
        if config.get("model_file") is not None or (config.get("auto_map") and not _known(config)):
            raise ModelUnavailable(f"{path} needs code of its own, and code from model folders is never run")
        weights = sorted(path.glob("model*.safetensors"))
        if not weights:
            raise ModelUnavailable(f"{path} holds no model*.safetensors")
        if not (path / "tokenizer.json").exists() and not (path / "tokenizer.model").exists():
            raise ModelUnavailable(f"{path} holds no tokenizer.json")
        return cls(path, config, weights)

    def load_model(self, progress: Progress) -> tuple[nn.Module, mx.Dtype]:
        """The model, all weights in memory, and the dtype that it computes in; see `for_device`."""
        progress("loading the weights", None)
        with unsound(f"The model in {self.path} cannot be loaded"):
            model, _ = mlx_lm_utils.load_model(self.path, lazy=True)
            return for_device(model)

    def load_tokenizer(self) -> ChatTokenizer:
        with unsound(f"The tokenizer in {self.path} cannot be loaded"):
            return ChatTokenizer(mlx_lm_utils.load_tokenizer(self.path, eos_token_ids=self._eos_ids()))

    def identity(self, tokenizer: ChatTokenizer, hashes: HashCache, progress: Progress) -> dict[str, str]:
        """The model part of the fingerprint, each a sha256."""
        texts = [self.path / name for name in TOKENIZER_FILES if (self.path / name).exists()]
        return {
            "weights": digest({file.name: hashes.sha256(file, progress) for file in self.weights}),
            "config": digest(self.config),
            "tokenizer": digest({file.name: hashes.sha256(file) for file in texts}),
            "chat_template": digest(tokenizer.chat_template),
            "rope": digest(rope_part(self.config)),
        }

    def max_context(self) -> int:
        """Tokens."""
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, dict):
                for key in ("max_position_embeddings", "max_sequence_length", "n_positions"):
                    if isinstance(config.get(key), int):
                        return int(config[key])
        return DEFAULT_CONTEXT

    def _eos_ids(self) -> list[int] | None:
        named = mlx_lm_utils.load_config(self.path).get("eos_token_id")
        return [named] if isinstance(named, int) else named


def for_device(model: nn.Module) -> tuple[nn.Module, mx.Dtype]:
    """The model as the default device runs it best, its weights evaluated, and the dtype that it computes in.

    On the CPU everything becomes float32 and nothing stays quantised: narrower arithmetic is slow there.
    Raises ModelUnavailable where that does not fit the machine's memory.
    """
    on_cpu = mx.default_device().type == mx.cpu
    if on_cpu:
        model = _widened(model)
    mx.eval(model.parameters())
    return model, mx.float32 if on_cpu else compute_dtype(model)


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of the model's activations: that of its embeddings."""
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedEmbedding) and module.scales.dtype != mx.uint8:
            return module.scales.dtype
        if isinstance(module, nn.Embedding):
            return module.weight.dtype
    return mx.bfloat16


def _widened(model: nn.Module) -> nn.Module:
    needed = 4 * mlx_lm_utils.get_total_parameters(model)
    limit = MEMORY_SHARE * psutil.virtual_memory().total
    if needed > limit:
        raise ModelUnavailable(
            f"In float32, as the CPU needs it, this model takes {needed / 2**30:.1f} GiB; "
            f"this machine has room for {limit / 2**30:.1f} GiB. Use a smaller model or a GPU."
        )
    model.set_dtype(mx.float32)
    model = mlx_lm_utils.dequantize_model(model)
    model.set_dtype(mx.float32)
    return model


def _known(config: dict[str, Any]) -> bool:
    """True where mlx-lm has the architecture itself, so that code in the folder is not needed."""
    try:
        mlx_lm_utils._get_classes(config)
    except ValueError:
        return False
    return True
