"""Texts to vectors for clients, with the encoder of episodic memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from agentmem.engine.encoders import Encoders
from agentmem.episode.encoder import Encoder
from agentmem.errors import Overloaded

T = TypeVar("T")

BATCH = 8
"""Texts between two steps of the engine: replies that run meanwhile wait for no more."""
LOADING_S = 60.0


class Call(Protocol):
    """Runs a job on the engine thread and waits for its result."""

    def __call__(self, job: Callable[[], T]) -> T: ...


class Embedded(NamedTuple):
    """Unit rows float32 [texts, dims], how many tokens were read, and by which encoder."""

    rows: NDArray[np.float32]
    tokens: int
    encoder: str


class Embedding:
    """May be used from any thread but the engine's."""

    def __init__(self, call: Call, encoders: Encoders) -> None:
        self._call, self._encoders = call, encoders

    def embed(self, texts: list[str]) -> Embedded:
        """Raises Overloaded while the encoder's weights are still being fetched."""
        encoder = self._encoder()
        parts, tokens = [], 0
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            parts.append(self._call(lambda batch=batch: encoder.encode(batch)))  # type: ignore[misc]
            tokens += sum(encoder.lengths(batch))
        return Embedded(np.concatenate(parts), tokens, encoder.name)

    @property
    def name(self) -> str:
        """The encoder that the settings name."""
        return self._encoders.name

    def _encoder(self) -> Encoder:
        deadline = time.monotonic() + LOADING_S
        while (encoder := self._call(self._encoders.get)) is None:
            if time.monotonic() > deadline:
                raise Overloaded("the encoder's weights are being fetched; try again")
            time.sleep(0.05)
        return encoder
