"""The encoder of episodic memory: there when its weights and the clustering library are, and nobody waits for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from agentmem.episode.encoder import Encoder, encoder_in, weights_of
from agentmem.episode.hashed import HashedEncoder
from agentmem.episode.topic import load_libraries

log = logging.getLogger(__name__)


class Encoders:
    """Engine thread only. `wake` is called from another thread when all is there."""

    def __init__(self, name: str, models: Path, wake: Callable[[], None]) -> None:
        self.name, self._models, self._wake = name, models, wake
        self._weights: Future[Path | None] | None = None
        self._encoder: Encoder | None = None

    def get(self) -> Encoder | None:
        """The encoder; None while what it needs is fetched, which begins now. Without weights it is the one that needs none."""
        if self._encoder is not None:
            return self._encoder
        if self._weights is None:
            self._weights = Future()
            threading.Thread(target=self._fetch, args=(self._weights,), name="encoder", daemon=True).start()
        if not self._weights.done():
            return None
        try:
            self._encoder = encoder_in(self.name, self._weights.result())
        except Exception as error:  # a folder may hold anything
            log.warning("episodes are told apart by words alone (%s): %s", HashedEncoder.name, error)
            self._encoder = HashedEncoder()
        return self._encoder

    def _fetch(self, outcome: Future[Path | None]) -> None:
        try:
            load_libraries()
            outcome.set_result(weights_of(self.name, self._models))
        except BaseException as error:
            outcome.set_exception(error if isinstance(error, Exception) else OSError(str(error)))
        self._wake()
