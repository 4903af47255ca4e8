"""Feeding tokens to the model: its layers get the caches that their kinds ask for, and tables take in what it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from agentmem.engine.batch import DecodeStep, Plans
from agentmem.engine.carry import CarryStep, State, arrays_of
from agentmem.engine.layout import BLANK
from agentmem.engine.packing import GivenRows
from agentmem.engine.table import Table
from agentmem.model.anatomy import Anatomy
from agentmem.model.network import Network


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of one sequence on its way: `apply` after `arrays` are evaluated. Until then its table is as it was."""

    logits: mx.array
    arrays: list[mx.array]
    apply: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Fed:
    """A decode step on its way: `rows` of every layer and the `states` that each sequence carries along behind it."""

    logits: mx.array
    step: DecodeStep
    rows: list[mx.array]
    states: list[tuple[State, ...]]

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.rows, *(a for states in self.states for a in arrays_of(states))]

    def apply(self, tokens: Sequence[int], kept: Sequence[int]) -> dict[int, Exception]:
        """Give the tables of `kept` their rows and states; see `DecodeStep.apply`."""
        for i in kept if self.states else ():
            carry = self.step.tables[i].carry
            assert carry is not None
            carry.move(self.states[i], 1)
        return self.step.apply(self.rows, tokens, kept)


class Feed:
    """Engine thread only."""

    def __init__(self, network: Network, anatomy: Anatomy) -> None:
        self.network, self.anatomy = network, anatomy
        self._blank = not anatomy.paged

    def chunk(self, table: Table, tokens: list[int], rows: Sequence[int]) -> Chunk:
        """Run the model over the next tokens of one sequence; logits of those of them that `rows` name.

        Raises Overloaded, changing nothing, when there are not the slots.
        """
        views, carry, n = table.views(), table.carry, len(tokens)
        held = carry.views() if carry is not None else []
        logits = self.network.logits(mx.array([tokens]), self.anatomy.caches(views, held), rows)
        arrays, absorb = table.absorb([GivenRows(_blank(n))] if self._blank else views, tokens)
        states = carry.after(held, n) if carry is not None else ()

        def apply() -> None:
            absorb()
            if carry is not None:
                carry.move(states, n)

        return Chunk(logits, [*arrays, *arrays_of(states)], apply)

    def step(
        self, tables: list[Table], tokens: mx.array, at: Sequence[int], query_heads: int, plans: Plans | None
    ) -> Fed:
        """One token for each table, int [B]; logits of those that `at` names. Precondition: they have reserved their slots."""
        step = DecodeStep(tables, query_heads, plans)
        views = step.views()
        carries = [t.carry for t in tables if t.carry is not None]
        held = CarryStep(carries) if carries else None
        caches = self.anatomy.caches(views, held.views() if held is not None else [])
        logits = self.network.logits(tokens[:, None], caches, at)
        rows = [_blank(len(tables))] if self._blank else [v.rows() for v in views]
        return Fed(logits, step, rows, held.after() if held is not None else [])


def _blank(n: int) -> mx.array:
    """What pages get of `n` tokens of a model that keeps no rows."""
    return mx.zeros((n, BLANK.raw_words), mx.uint32)
