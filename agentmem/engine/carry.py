"""What a sequence carries along: the state of layers that keep a window, or arrays of constant size, instead of pages.

States are immutable: a fork shares them, and an earlier one is kept by holding on to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from agentmem.engine.windows import BatchWindowView, WindowLayer, WindowPass, WindowState, WindowView
from agentmem.model.recurrent import RecurrentLayer, RecurrentState, joined, states_of

State = WindowState | RecurrentState
Layer = WindowLayer | RecurrentLayer

RECENT = 8
"""Tokens that can be taken back, as the end of a stop sequence is."""
RECENT_BYTES = 64 << 20
"""What may be kept for that beside the state at the end of the prompt."""


@dataclass(frozen=True, slots=True)
class Baggage:
    """The layers of a model that are carried, in its order."""

    layers: tuple[Layer, ...]
    page_tokens: int

    def most_words(self) -> int:
        """Words of a checkpoint of all of them, at most."""
        return sum(layer.most_words() for layer in self.layers)

    def words(self, tokens: int) -> int:
        """Words of a checkpoint behind `tokens` tokens."""
        return sum(layer.words(tokens) for layer in self.layers)


class Carry:
    """The states behind the first `tokens` tokens of one sequence. Engine thread only.

    `marks` are states at earlier places that are to be kept as checkpoints.
    """

    def __init__(self, baggage: Baggage) -> None:
        self.baggage = baggage
        self.tokens = 0
        self.states: tuple[State, ...] = tuple(layer.empty() for layer in baggage.layers)
        self.marks: dict[int, tuple[State, ...]] = {}
        self._anchor = (0, self.states)
        recent = RECENT_BYTES // max(1, 4 * baggage.most_words())
        self._recent: deque[tuple[int, tuple[State, ...]]] = deque(maxlen=max(1, min(RECENT, recent)))

    def fork(self) -> Carry:
        """The same states, without the marks."""
        other = Carry(self.baggage)
        other.tokens, other.states = self.tokens, self.states
        other._recent, other._anchor = self._recent.copy(), self._anchor
        return other

    def views(self) -> list[Any]:
        """What the carried layers take as their caches in a pass over this sequence."""
        window = WindowPass(self.tokens)
        return [state.view(window) for state in self.states]

    def after(self, views: Sequence[Any], n: int) -> tuple[State, ...]:
        """The states behind a pass over `n` tokens, lazily. Precondition: the model ran with `views`."""
        states: list[State] = []
        for layer, view in zip(self.baggage.layers, views, strict=True):
            if isinstance(view, WindowView):
                states.append(view.state.after(view.rows(), n))
            else:
                assert isinstance(layer, RecurrentLayer)
                states.append(states_of(layer, view)[0])
        return tuple(states)

    def move(self, states: tuple[State, ...], n: int) -> None:
        """`n` more tokens have been fed, and these are the states now."""
        self._recent.append((self.tokens, self.states))
        self.tokens, self.states = self.tokens + n, states

    def mark(self) -> None:
        """Keep the states of this place."""
        self.marks[self.tokens] = self.states

    def anchor(self) -> None:
        """Nothing will be cut before this place: the prompt ends here."""
        self._anchor = self.tokens, self.states

    def cut(self, tokens: int) -> int:
        """Go back to `tokens` tokens, or as little further as states are kept; returns where that is."""
        places = {0: tuple(layer.empty() for layer in self.baggage.layers)} | dict([self._anchor])
        places |= self.marks | dict(self._recent) | {self.tokens: self.states}
        at = max(n for n in places if n <= tokens)
        self.tokens, self.states = at, places[at]
        self.marks = {n: s for n, s in self.marks.items() if n <= at}
        self._recent = deque(((n, s) for n, s in self._recent if n < at), self._recent.maxlen)
        return at


def arrays_of(states: Sequence[State]) -> list[mx.array]:
    """What is to be evaluated of states."""
    return [array for state in states for array in state.arrays()]


def packed(states: Sequence[State]) -> mx.array:
    """The states as words, uint32 [words], lazily."""
    return mx.concatenate([mx.zeros((0,), mx.uint32), *(state.packed() for state in states)])


def unpacked(baggage: Baggage, words: mx.array, tokens: int) -> tuple[State, ...]:
    """The states behind `tokens` tokens, of what `packed` made."""
    states: list[State] = []
    at = 0
    for layer in baggage.layers:
        size = layer.words(tokens)
        states.append(layer.unpacked(words[at : at + size], tokens))
        at += size
    return tuple(states)


class CarryStep:
    """One decode step of several sequences: the carried layers' views of all of them."""

    def __init__(self, carries: Sequence[Carry]) -> None:
        self.carries = carries
        passes = [WindowPass(c.tokens) for c in carries]
        self._views: list[Any] = []
        for number, layer in enumerate(carries[0].baggage.layers):
            states = [c.states[number] for c in carries]
            if isinstance(layer, RecurrentLayer):
                self._views.append(joined(layer, [s for s in states if isinstance(s, RecurrentState)]))
            else:
                windows = [s for s in states if isinstance(s, WindowState)]
                self._views.append(BatchWindowView(windows, passes))

    def views(self) -> list[Any]:
        return self._views

    def after(self) -> list[tuple[State, ...]]:
        """The states of each sequence behind the step, lazily. Precondition: the model ran."""
        columns: list[Sequence[State]] = []
        for layer, view in zip(self.carries[0].baggage.layers, self._views, strict=True):
            columns.append(states_of(layer, view) if isinstance(layer, RecurrentLayer) else view.after())
        return list(zip(*columns, strict=True))
