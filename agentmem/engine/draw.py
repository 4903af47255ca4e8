"""The next tokens of the sequences of one step: chosen together, with log probabilities where they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from agentmem.engine.logprobs import Ranking
from agentmem.engine.request import TokenLogprob
from agentmem.engine.sampler import choose_batch
from agentmem.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token, and what the model thought of it when the request asks for that."""

    token: int
    logprob: TokenLogprob | None = None


class Draw:
    """One token for each of `sequences`, lazily; `n` tokens, from the same logits, where a prompt with `n` replies ends.

    `tokens` int32 [tokens chosen]; those of the first sequence first.
    """

    def __init__(
        self, sequences: list[Sequence], logits: mx.array, pending: Collection[Sequence] = ()
    ) -> None:
        """logits [len(sequences), vocab], behind the last token of each; the token before it is not read yet of `pending`."""
        self._counts = [1 if s.phase == "decode" else s.request.n for s in sequences]
        samplers = [
            sampler for s, n in zip(sequences, self._counts, strict=True) for sampler in s.samplers(n)
        ]
        if len(samplers) > len(sequences):
            rows = np.repeat(np.arange(len(sequences)), self._counts)
            logits = logits[mx.array(rows)]
        positions = [
            s.position + (s in pending)
            for s, n in zip(sequences, self._counts, strict=True)
            for _ in range(n)
        ]
        self.tokens = choose_batch(samplers, logits, positions)
        tops = [
            s.request.top_logprobs for s, n in zip(sequences, self._counts, strict=True) for _ in range(n)
        ]
        self._rankings = {
            row: Ranking(logits[row], self.tokens[row], top)
            for row, top in enumerate(tops)
            if top is not None
        }

    @property
    def arrays(self) -> list[mx.array]:
        """To be evaluated with the step."""
        return [self.tokens, *(a for ranking in self._rankings.values() for a in ranking.arrays)]

    def read(self, piece: Callable[[int], bytes]) -> list[list[Chosen]]:
        """What was chosen for each sequence; `piece` gives the bytes of a token."""
        flat = [
            Chosen(token, self._rankings[row].read(piece) if row in self._rankings else None)
            for row, token in enumerate(np.array(self.tokens).tolist())
        ]
        ends = np.cumsum(self._counts).tolist()
        return [flat[end - n : end] for end, n in zip(ends, self._counts, strict=True)]
