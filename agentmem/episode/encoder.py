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

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of each text are read."""
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


def weights_of(name: str, models: Path | None = None, progress: Progress = silent) -> Path | None:
    """The folder of an encoder's weights, fetched where they are not there yet; None for hash512, which has none. Any thread.

    `name`: "minilm", "hash512", a sentence-transformers folder, or "org/name" of the Hugging Face hub. `models`: where weights
    are kept, the home's folder of models by default. Raises ModelUnavailable with what to do about it.
    """
    if name == HashedEncoder.name:
        return None
    from agentmem.episode.minilm import minilm_folder

    models = models or Home(default_home()).models
    if name == "minilm":
        return minilm_folder(models, progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if hub.is_repository(name):
        try:
            return hub.hub_folder(name, models, progress)
        except ModelUnavailable as error:
            raise ModelUnavailable(
                f"{error.message}. As an encoder 'minilm' needs a package index only, 'hash512' nothing at all"
            ) from error
    raise ModelUnavailable(
        f"There is no encoder {name!r}: name 'minilm', 'hash512', a sentence-transformers folder, "
        "or a BERT of the Hugging Face hub (org/name)"
    )


def encoder_of(name: str, models: Path | None = None, progress: Progress = silent) -> Encoder:
    """Load an encoder; see `weights_of`. All but hash512 are MLX objects: load and run them on the engine thread."""
    return encoder_in(name, weights_of(name, models, progress))


def encoder_in(name: str, folder: Path | None) -> Encoder:
    """The encoder whose weights are in a folder. Raises ModelUnavailable."""
    if folder is None:
        return HashedEncoder()
    from agentmem.episode.sentences import SentenceEncoder

    known = name == "minilm" or not Path(name).expanduser().is_dir()
    return SentenceEncoder.load(folder, name if known else folder.name)
