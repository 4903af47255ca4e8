"""A blend in the engine: the layers of a composed prompt one by one, before any of its rows are in the table.

A table only grows at its end, and a blend changes rows in the middle: it works on arrays, and puts them when they are done.
"""

from __future__ import annotations

import mlx.core as mx

from agentmem.compose.blend import Walk
from agentmem.compose.planners import Blend
from agentmem.compose.rotation import Rotation
from agentmem.engine.packing import GivenRows
from agentmem.engine.table import Table
from agentmem.engine.views import History, LayerRows, whole_rows
from agentmem.model.network import Network


class Blending:
    """Engine thread only. Precondition until `put`: nothing else comes behind the table."""

    def __init__(
        self, table: Table, network: Network, rotations: list[Rotation], dtype: mx.Dtype, step: Blend
    ) -> None:
        self._table, self._rotations, self._dtype, self._ids = table, rotations, dtype, step.ids
        self._start = len(table)
        self._keys, self._values = step.state.keys, step.state.values
        self._walk = Walk(network, step.ids, self._start, step.unknown, step.share)
        self._rows: list[mx.array] = []

    def advance(self) -> bool:
        """Go through one more layer; False when all are done. What is stored of the prefix is read from the table."""
        layer, g = self._walk.layers, self._table.pool.geometry
        if layer == g.layers:
            return False
        codec, key_map = g.codecs[layer], g.key_maps[layer]
        stored = LayerRows(History(self._table), layer)
        old_keys, old_values = whole_rows(codec, stored, self._dtype)
        # The prefix comes in whatever order it is stored: all tokens see all of it.
        keys = [key_map.restored(k[None])[0] for k in old_keys]
        keys.append(self._rotations[layer].rotate(self._keys[layer], self._start))
        values = [*old_values, self._values[layer]]
        made = self._walk.through(
            *(
                mx.concatenate([part.astype(self._dtype) for part in parts], axis=1)
                for parts in (keys, values)
            )
        )
        new_keys = key_map.keys(made.keys[None, :, self._start :])[0]
        self._rows.append(codec.raw(new_keys, made.values[:, self._start :]))
        mx.eval(self._rows[-1], self._walk.hidden)
        return True

    def put(self, most: int) -> None:
        """Up to `most` of the rows that are next go behind what the table holds. Raises Overloaded, changing nothing."""
        at = len(self._table) - self._start
        part = slice(at, at + most)
        arrays, apply = self._table.absorb([GivenRows(r[part]) for r in self._rows], list(self._ids[part]))
        mx.eval(arrays)
        apply()
