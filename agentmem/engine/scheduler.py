"""The scheduler: what is fed in one step. All that decode, then as much prefill as the time between tokens allows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic

from agentmem.engine.order import C, Order, Shares
from agentmem.engine.pace import Pace, Part

GRAIN = 16
PREFILL_PATIENCE = 3
ADMISSION_PATIENCE = 8


@dataclass(frozen=True, slots=True)
class Step(Generic[C]):
    """`decode` runs as one batch, then `prefill` as one packed pass: (sequence, tokens of its prompt)."""

    decode: list[C]
    prefill: list[tuple[C, int]]


class Scheduler(Generic[C]):
    """Plans steps. Engine thread only. Knows the time only through `pace`, which the engine feeds.

    While somebody decodes, a prefill pass ends within `itl_target_ms` of the step's begin, by what was measured; it has at
    least 16 tokens, so that prompts go on where the target cannot be kept. Only then do cuts depend on the time: else prompts
    are cut at the multiples of `chunk_tokens`, and a pass has as many pieces as make up one of that length.
    """

    def __init__(self, pace: Pace, *, itl_target_ms: float, chunk_tokens: int) -> None:
        self.pace = pace
        self.itl_target_ms = itl_target_ms
        self.chunk_tokens = chunk_tokens
        self._shares = shares = Shares()
        self._prefilling: set[Hashable] = set()
        self._queued: set[Hashable] = set()
        self._prefill: Order[C] = Order(PREFILL_PATIENCE, shares)
        self._admission: Order[C] = Order(ADMISSION_PATIENCE, shares)

    def plan(self, decoding: Sequence[C], prefilling: Sequence[C]) -> Step[C]:
        """Everything of `decoding`, and a pass over the first of `prefilling`: at most `chunk_tokens` tokens in all."""
        self._prefilling = {c.agent_key for c in prefilling}
        self._shares.present(self._prefilling | self._queued)
        limit = self._limit_ms(len(decoding))
        pieces: list[tuple[C, int]] = []
        parts: list[Part] = []
        left = self.chunk_tokens
        for candidate in self._prefill.ranked(prefilling, self._rest_ms):
            tokens = self._piece(candidate, left, limit, parts)
            if not tokens:
                continue
            pieces.append((candidate, tokens))
            parts.append((tokens, candidate.history))
            left -= tokens
        self._prefill.chosen({c for c, _ in pieces})
        per_token = self.pace.prefill_ms(parts) / max(1, self.chunk_tokens - left)
        for candidate, tokens in pieces:
            self._shares.charge(candidate.agent_key, per_token * tokens)
        return Step(list(decoding), pieces)

    def _limit_ms(self, decoding: int) -> float | None:
        """Time that a prefill pass may take; None for any, while nobody waits for a token."""
        if not decoding:
            return None
        return self.itl_target_ms - self.pace.decode_ms(decoding) if self.pace.measured else 0.0

    def _rest_ms(self, candidate: C) -> float:
        return self.pace.prefill_ms([(candidate.remaining, candidate.history)])

    def _piece(self, candidate: C, left: int, limit: float | None, parts: list[Part]) -> int:
        """Tokens of `candidate` that join a pass which has `parts` and room for `left` tokens; 0 when none fit."""
        whole = min(candidate.remaining, self.chunk_tokens - candidate.history % self.chunk_tokens)
        if whole > left:
            return 0
        if self._fits(whole, candidate, limit, parts):
            return whole
        low, high = 0, whole // GRAIN
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(middle * GRAIN, candidate, limit, parts):
                low = middle
            else:
                high = middle - 1
        return low * GRAIN if low or parts else min(GRAIN, whole)

    def _fits(self, tokens: int, candidate: C, limit: float | None, parts: list[Part]) -> bool:
        return limit is None or self.pace.prefill_ms([*parts, (tokens, candidate.history)]) <= limit

    def waiting(self, candidates: Sequence[C]) -> list[C]:
        """Requests that wait for admission, the one to be admitted first first."""
        self._queued = {c.agent_key for c in candidates}
        self._shares.present(self._prefilling | self._queued)
        return self._admission.ranked(candidates, self._rest_ms)

    def must_be_next(self, candidate: C) -> bool:
        """Whether nobody may be admitted before this request any more, even while it waits for room."""
        return self._admission.due(candidate)

    def admitted(self, candidate: C) -> None:
        """One of `waiting` was admitted."""
        self._admission.chosen({candidate})
