"""How far answers over one cache are from those over another: gold answers, their tokens fed one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from agentmem.bench.held import log_p
from agentmem.episode.held import Held
from agentmem.model.chat import ChatTokenizer

AT_ONCE = 6
"""Questions that are read side by side."""
REPLY = 24
"""Tokens of a reply that is to name a fact."""


class Judge:
    """Questions with their answers as token ids, and what the full cache says to them.

    `planted`: the texts of those answers that a reply is to name, by their question's number.
    """

    def __init__(
        self, full: Held, asked: Sequence[tuple[list[int], list[int]]], planted: Mapping[int, str], tokenizer: ChatTokenizer
    ) -> None:  # fmt: skip
        self.asked, self._planted, self._tokenizer = list(asked), planted, tokenizer
        self.wanted = self._predictions(full, range(len(self.asked)))

    def scores(
        self, held: Held, numbers: Sequence[int] | None = None
    ) -> dict[int, tuple[float, float, float, bool]]:
        """Of each question, or of these: KL to the full cache, agreement with it, and nats of the answer, each a token of the
        answer on average; and whether a greedy reply names a planted fact, of others whether every token is the likeliest."""
        some = range(len(self.asked)) if numbers is None else numbers
        got = self._predictions(held, some)
        out = {}
        for n in some:
            kl, top1, nll, exact = self._score(self.wanted[n], got[n], self.asked[n][1])
            if n in self._planted:
                exact = self._planted[n].lower() in self._reply(held, n).lower()
            out[n] = kl, top1, nll, exact
        return out

    def _reply(self, held: Held, number: int) -> str:
        """The greedy reply to a question, cut off."""
        said, cache, fed = list[int](), held.copy(), self.asked[number][0]
        while len(said) < REPLY:
            logits = cache.absorb(fed, logits=True)
            assert logits is not None
            fed = [int(np.array(logits.argmax()))]
            if fed[0] in self._tokenizer.eos_ids:
                break
            said += fed
        return self._tokenizer.decode(said)

    def _predictions(self, held: Held, numbers: Sequence[int]) -> dict[int, np.ndarray]:
        """log p [tokens of the answer, vocab] of each question."""
        out: dict[int, np.ndarray] = {}
        for start in range(0, len(numbers), AT_ONCE):
            some = numbers[start : start + AT_ONCE]
            texts = [[*self.asked[n][0], *self.asked[n][1][:-1]] for n in some]
            longest, rows, ends = max(map(len, texts)), list[int](), [0]
            for place, n in enumerate(some):
                question, answer = self.asked[n]
                first = place * longest + len(question) - 1
                rows += range(first, first + len(answer))
                ends.append(len(rows))
            made = np.array(log_p(held.predictions(texts, rows)))
            mx.clear_cache()
            out |= {n: made[ends[i] : ends[i + 1]] for i, n in enumerate(some)}
        return out

    @staticmethod
    def _score(
        wanted: np.ndarray, got: np.ndarray, answer: Sequence[int]
    ) -> tuple[float, float, float, bool]:
        likeliest = got.argmax(axis=-1)
        return (
            float((np.exp(wanted) * (wanted - got)).sum(axis=-1).mean()),
            float((wanted.argmax(axis=-1) == likeliest).mean()),
            float(-got[np.arange(len(answer)), list(answer)].mean()),
            bool((likeliest == np.array(answer)).all()),
        )
