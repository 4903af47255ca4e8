"""Texts to vectors whose angle says how much two texts are about the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from agentmem.episode.hashed import HashedEncoder
from agentmem.errors import ModelUnavailable
from agentmem.home import Home, default_home
from agentmem.model import hub
from agentmem.model.progress import Progress, silent


class Encoder(Protocol):
    """An encoder that is ready to run, on the thread that loaded it. `name` is public, `dims` the length of a vector."""

    name: str
    dims: int

    def encode(self, texts: Sequence[str], query: bool = False) -> NDArray[np.float32]:
        """Unit rows float32 [len(texts), dims]. `query`: the texts are questions to other texts."""
        ...


class Thresholds(NamedTuple):
    """Cosines that depend on the encoder.

    question: of a question to the nearest centroid of its own conversation, which one in twenty does not reach. segment: of a
    segment to its topic's centroid, below which it is of another.
    """

    question: float
    segment: float


def thresholds_of(name: str) -> Thresholds:
    """Those of an encoder, measured on conversations; an unknown one has those of MiniLM."""
    return Thresholds(0.22, 0.35) if name == HashedEncoder.name else Thresholds(0.30, 0.45)


def encoder_of(name: str, models: Path | None = None, progress: Progress = silent) -> Encoder:
    """Load "minilm", "hash512", a sentence-transformers folder, or "org/name" of the Hugging Face hub.

    All but hash512 are MLX objects: load and run them on the engine thread. `models`: where weights are kept, the home's
    folder of models by default. Raises ModelUnavailable with what to do about it.
    """
    if name == HashedEncoder.name:
        return HashedEncoder()
    from agentmem.episode.minilm import minilm_folder
    from agentmem.episode.sentences import SentenceEncoder

    models = models or Home(default_home()).models
    if name == "minilm":
        return SentenceEncoder.load(minilm_folder(models, progress), name)
    path = Path(name).expanduser()
    if path.is_dir():
        return SentenceEncoder.load(path, path.resolve().name)
    if hub.is_repository(name):
        try:
            return SentenceEncoder.load(hub.hub_folder(name, models, progress), name)
        except ModelUnavailable as error:
            raise ModelUnavailable(
                f"{error.message}. As an encoder 'minilm' needs a package index only, 'hash512' nothing at all"
            ) from error
    raise ModelUnavailable(
        f"There is no encoder {name!r}: name 'minilm', 'hash512', a sentence-transformers folder, "
        "or a BERT of the Hugging Face hub (org/name)"
    )
