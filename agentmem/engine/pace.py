"""Pace: how fast this machine decodes, prefills and ends turns, measured while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Part = tuple[int, int]
"""A sequence's share of a prefill pass: (tokens fed, tokens of history before them)."""

ALIKE = 8
"""Passes of a size that are remembered: where all of late are short, those of long ago still tell what a token adds."""
SLOWER = 2.0
CLIP = 3.0
PAIRS_LAST = 8.0
TELLING = 256
NEAR = 1024.0
"""Looking back this far is little of a token's work."""
WEIGHT = 0.2


class Pass(NamedTuple):
    """A measured prefill pass; `attended` counts pairs of a token and one that it looks at."""

    tokens: float
    attended: float
    ms: float


class Average:
    """An exponential average that one slow first call, or one hiccup later, does not spoil."""

    def __init__(self) -> None:
        self.value = 0.0
        self._seen = 0

    def add(self, sample: float) -> None:
        if self._seen == 0:
            self.value = sample
        elif self._seen == 1:
            self.value = min(self.value, sample)
        else:
            self.value += WEIGHT * (min(sample, CLIP * self.value) - self.value)
        self._seen += 1

    @property
    def known(self) -> bool:
        return self._seen > 0


class Pace:
    """Times in milliseconds. Written by the engine thread; `wait_ms` may be asked on any thread."""

    def __init__(self) -> None:
        self._decode: dict[int, Average] = {}
        self._passes: dict[int, deque[Pass]] = {}
        """By the power of two that their tokens are below."""
        self._cost: tuple[float, float, float] | None = None
        self.rate: float | None = None
        self._turn = Average()
        self.itl = Average()

    def decoded(self, batch: int, ms: float) -> None:
        """One decode step of `batch` sequences took `ms`."""
        self._decode.setdefault(batch, Average()).add(ms)

    def decode_ms(self, batch: int) -> float:
        """What a decode step of `batch` sequences takes; from other batch sizes where this one was not seen, 0 without any.

        A step over more sequences takes no less, and at most as much longer as it has more of them.
        """
        if not batch or not self._decode:
            return 0.0
        if batch in self._decode:
            return self._decode[batch].value
        larger = min((b for b in self._decode if b > batch), default=None)
        smaller = max((b for b in self._decode if b < batch), default=None)
        bounds = []
        if larger is not None:
            bounds.append(self._decode[larger].value)
        if smaller is not None:
            bounds.append(self._decode[smaller].value * batch / smaller)
        return min(bounds)

    def prefilled(self, parts: Sequence[Part], ms: float) -> None:
        """One prefill pass over `parts` took `ms`."""
        seen = Pass(*_work(parts), max(ms, 1e-6))
        self._passes.setdefault(int(seen.tokens).bit_length(), deque(maxlen=ALIKE)).append(seen)
        self._cost = _fit(_sound(np.array([p for alike in self._passes.values() for p in alike])))

    def prompt_read(self, tokens: int, ms: float) -> None:
        """All of a prompt that was not remembered was prefilled. `rate`, in tokens per millisecond, is that of the last one
        that was long enough to tell.
        """
        if tokens >= TELLING and ms > 0:
            self.rate = tokens / ms

    @property
    def measured(self) -> bool:
        """Whether a prefill pass was seen."""
        return self._cost is not None

    def prefill_ms(self, parts: Sequence[Part]) -> float:
        """What a prefill pass over `parts` takes; one millisecond a token while no pass was seen."""
        tokens, attended = _work(parts)
        if self._cost is None:
            return tokens
        fixed, per_token, per_pair = self._cost
        return fixed + per_token * tokens + per_pair * attended

    def stepped(self, ms: float) -> None:
        """Those that decode waited `ms` for their tokens: a whole step."""
        self.itl.add(ms)

    def turn_ended(self, ms: float) -> None:
        """A turn took `ms` from its admission to its end."""
        self._turn.add(ms)

    def wait_ms(self, ahead: int, batch: int) -> float:
        """How long a request waits that has `ahead` others before it, where `batch` run side by side; 0 while unknown."""
        return self._turn.value * ahead / max(1, batch)


def _work(parts: Sequence[Part]) -> tuple[float, float]:
    return float(sum(n for n, _ in parts)), float(sum(n * (history + n / 2) for n, history in parts))


def _sound(passes: np.ndarray) -> np.ndarray:
    """The passes without those that took far longer than another one allows: a first call compiles, a machine pauses.

    k times the tokens take at most k times as long, and more only as far as they look back further than `NEAR`.
    """
    tokens, ms = passes[:, 0], passes[:, 2]
    reach = np.maximum(passes[:, 1] / tokens, NEAR)
    more = np.maximum(1.0, tokens[:, None] / tokens) * np.maximum(1.0, reach[:, None] / reach)
    return passes[(ms[:, None] <= SLOWER * more * ms).all(axis=1)]


def _fit(passes: np.ndarray) -> tuple[float, float, float]:
    """Time of a pass = fixed + per_token * tokens + per_pair * attended, none negative: least squares of relative errors.

    passes [n, 3] in the order of `Pass`. Where the passes do not tell the terms apart, the first two share the time.
    """
    ms = passes[:, 2]
    columns = np.stack([np.ones(len(ms)), passes[:, 0], passes[:, 1]], axis=1)
    scale = np.maximum(columns.max(axis=0), 1e-9) * np.array([1.0, 1.0, PAIRS_LAST])
    system = columns / scale / ms[:, None]
    used = [0, 1, 2]
    while True:
        solution = np.linalg.lstsq(system[:, used], np.ones(len(ms)), rcond=1e-6)[0]
        if solution.min() >= 0 or len(used) == 1:
            break
        del used[int(solution.argmin())]
    cost = np.zeros(3)
    cost[used] = np.maximum(solution, 0.0) / scale[used]
    return float(cost[0]), float(cost[1]), float(cost[2])
