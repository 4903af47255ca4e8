"""The course of a composed prompt: which of its tokens are put, which are read, and how far it has come."""

from __future__ import annotations

from itertools import accumulate

import mlx.core as mx

from agentmem.compose.planners import Blend, Put, Read, Steps, merged
from agentmem.compose.reuse import DEFAULT
from agentmem.compose.rotation import Rotation, rotated
from agentmem.compose.segment import Provenance
from agentmem.engine.blending import Blending
from agentmem.engine.packing import GivenRows
from agentmem.engine.table import Table
from agentmem.model.network import Network

AT_ONCE = 512
"""Tokens whose rows are made in one go."""


class Course:
    """Steps that follow each other behind the first `start` tokens of a prompt. Where it stands shows in the table's length.

    States that have been put are let go of. `provenance` is that of what is said behind them; a `planner` made them.
    """

    def __init__(self, steps: Steps, start: int, provenance: Provenance, planner: str = DEFAULT) -> None:
        self.provenance, self.planner = provenance, planner
        steps = merged(steps)
        ends = list(accumulate((len(s.ids) for s in steps), initial=start))
        self._steps: list[tuple[int, int, Put | Read | Blend]] = list(
            zip(ends, ends[1:], steps, strict=False)
        )
        self.end = ends[-1]
        self._blending: Blending | None = None

    @property
    def nbytes(self) -> int:
        """What the states that are still to be put take."""
        return sum(step.state.nbytes for _, _, step in self._steps if not isinstance(step, Read))

    def put(self, table: Table, rotations: list[Rotation], network: Network, dtype: mx.Dtype) -> bool:
        """Put the tokens that are next, if they are to be put; a layer of a blend, with False as long as it is not done.

        `dtype` is the model's.
        Raises Overloaded when there are no slots for them; what is there then stays.
        """
        while found := self._at(len(table)):
            start, _, step = found
            if isinstance(step, Blend):
                self._blending = self._blending or Blending(table, network, rotations, dtype, step)
                if self._blending.advance():
                    return False
                self._blending.put(AT_ONCE)
                continue
            self._blending = None
            if isinstance(step, Read):
                return True
            at = len(table) - start
            part = slice(at, at + AT_ONCE)
            put(table, rotations, dtype, Put(step.ids[part], step.state[part]))
        return True

    def read_until(self, history: int) -> int:
        """Where the tokens end that are read from `history` on, up to the next that are put."""
        step = self._at(history)
        return step[1] if step is not None else self.end

    def _at(self, history: int) -> tuple[int, int, Put | Read | Blend] | None:
        """(begin, end, step) of the step that token `history` belongs to."""
        while self._steps and self._steps[0][1] <= history:
            self._steps.pop(0)
        return self._steps[0] if self._steps else None


def put(table: Table, rotations: list[Rotation], dtype: mx.Dtype, step: Put) -> None:
    """Rows of a known state go behind what the table holds. Raises Overloaded, changing nothing."""
    g, start, state = table.pool.geometry, len(table), step.state
    rows = []
    turned = rotated(rotations, state.keys, start)
    for codec, key_map, keys, values in zip(g.codecs, g.key_maps, turned, state.values, strict=True):
        rows.append(GivenRows(codec.raw(key_map.keys(keys.astype(dtype)[None])[0], values)))
    arrays, apply = table.absorb(rows, list(step.ids))
    mx.eval(arrays)
    apply()
