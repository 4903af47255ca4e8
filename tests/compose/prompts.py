"""A tiny model, and prompts of fixed text around slots."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from agentmem.compose import planners
from agentmem.compose.planners import Piece, Steps
from agentmem.compose.prompt import Prompt
from agentmem.compose.rotation import rotations
from agentmem.compose.state import State
from agentmem.compose.template import Filling, Template, encoded
from agentmem.model import seam
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network
from agentmem.model.random import random_model

TEXT = "You keep the light.{{question}}Another says:{{answer}}Decide now."
CARRIER = "You are told:"
WINDOW, PATTERN = 16, 6


@dataclass
class Stage:
    """A model and a template of two slots."""

    model: LoadedModel
    network: Network
    template: Template

    def prompt(self) -> Prompt:
        return Prompt(self.network, rotations(self.model.model), self.model.dtype)

    def ids(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text)

    def filling(self, text: str) -> Filling:
        return encoded(self.prompt(), self.ids(CARRIER), self.ids(text))

    def pieces(self, question: str, answer: str) -> list[Piece]:
        return self.template.pieces({"question": self.filling(question), "answer": self.filling(answer)})

    def read(self, pieces: list[Piece]) -> tuple[Prompt, mx.array]:
        """The prompt read whole, and its logits."""
        return self.follow(planners.dense(pieces))

    def follow(self, steps: Steps) -> tuple[Prompt, mx.array]:
        prompt = self.prompt()
        return prompt, planners.run(prompt, steps)


def stage(architecture: str = "llama", layers: int = 3) -> Stage:
    model = random_model(architecture, seed=3, num_hidden_layers=layers)
    seam.install(model.model)
    network = Network(model.model)
    prompt = Prompt(network, rotations(model.model), model.dtype)
    return Stage(model, network, Template.read(TEXT, model.tokenizer, prompt))


def windowed_model() -> nn.Module:
    """Local layers with a local RoPE, and one global layer between them."""
    return random_model(
        "gemma3_text", seed=4, num_hidden_layers=PATTERN + 1, sliding_window=WINDOW, query_pre_attn_scalar=64,
        sliding_window_pattern=PATTERN, rope_theta=1e6, rope_local_base_freq=1e4,
    ).model  # fmt: skip


def apart(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item() if a.size else 0.0


def states_apart(a: State, b: State) -> float:
    return apart(a.rows, b.rows)


def divergence(wanted: mx.array, got: mx.array) -> float:
    """KL in nats between the predictions that two rows of logits [vocab] stand for."""
    p, q = (np.array(x, dtype=np.float64) for x in (wanted, got))
    p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum())
