"""How far answers over one cache are from those over another: gold answers, their tokens fed one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from agentmem.bench.held import log_p
from agentmem.episode.held import Held

AT_ONCE = 6
"""Questions that are read side by side."""


class Judge:
    """Questions with their answers as token ids, and what the full cache says to them.

    `choices`: of questions about planted facts, what else might be answered, by their number.
    """

    def __init__(
        self, full: Held, asked: Sequence[tuple[list[int], list[int]]], choices: Mapping[int, Sequence[list[int]]]
    ) -> None:  # fmt: skip
        self.asked, self._choices = list(asked), choices
        self.wanted = self._predictions(full, range(len(self.asked)))

    def scores(
        self, held: Held, numbers: Sequence[int] | None = None
    ) -> dict[int, tuple[float, float, float, bool]]:
        """Of each question, or of these: KL to the full cache, agreement with it, and nats of the answer, each a token of the
        answer on average; and whether every token is the likeliest, of a planted fact whether it is likelier, a token, than
        all other choices."""
        some = range(len(self.asked)) if numbers is None else numbers
        got = self._predictions(held, some)
        out = {}
        for n in some:
            kl, top1, nll, exact = self._score(self.wanted[n], got[n], self.asked[n][1])
            if n in self._choices:
                exact = nll < min(self._nats(held, n))
            out[n] = kl, top1, nll, exact
        return out

    def _nats(self, held: Held, number: int) -> list[float]:
        """Of each other choice, nats a token."""
        question, _ = self.asked[number]
        others = [(question, choice) for choice in self._choices[number]]
        got = self._likelihoods(held, others)
        return [_nll(p, answer) for p, (_, answer) in zip(got, others, strict=True)]

    def _predictions(self, held: Held, numbers: Sequence[int]) -> dict[int, np.ndarray]:
        """log p [tokens of the answer, vocab] of each question."""
        found = self._likelihoods(held, [self.asked[n] for n in numbers])
        return dict(zip(numbers, found, strict=True))

    def _likelihoods(self, held: Held, asked: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        """log p [tokens of the answer, vocab] of each question with its answer."""
        out: list[np.ndarray] = []
        for start in range(0, len(asked), AT_ONCE):
            some = asked[start : start + AT_ONCE]
            texts = [[*question, *answer[:-1]] for question, answer in some]
            longest, rows, ends = max(map(len, texts)), list[int](), [0]
            for place, (question, answer) in enumerate(some):
                first = place * longest + len(question) - 1
                rows += range(first, first + len(answer))
                ends.append(len(rows))
            made = np.array(log_p(held.predictions(texts, rows)))
            mx.clear_cache()
            out += [made[ends[i] : ends[i + 1]] for i in range(len(some))]
        return out

    @staticmethod
    def _score(
        wanted: np.ndarray, got: np.ndarray, answer: Sequence[int]
    ) -> tuple[float, float, float, bool]:
        likeliest = got.argmax(axis=-1)
        return (
            float((np.exp(wanted) * (wanted - got)).sum(axis=-1).mean()),
            float((wanted.argmax(axis=-1) == likeliest).mean()),
            _nll(got, answer),
            bool((likeliest == np.array(answer)).all()),
        )


def _nll(got: np.ndarray, answer: Sequence[int]) -> float:
    return float(-got[np.arange(len(answer)), list(answer)].mean())
