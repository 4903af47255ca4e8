"""A text on its way through the model, its past held as a format says: the rows, pages and attention of the engine."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from agentmem.bench.held import log_p
from agentmem.blockpool.pool import Pool
from agentmem.engine.carry import Carry
from agentmem.engine.feed import Feed
from agentmem.engine.layout import BLANK, Layout
from agentmem.engine.table import Table
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network
from agentmem.quant.paths import chosen
from agentmem.quant.selftest import self_tests


class Walk:
    """One sequence of at most `room` tokens. It is over after `end`."""

    def __init__(self, model: LoadedModel, plan: Layout, room: int) -> None:
        g = plan.geometry
        pool = Pool(g, g.worst_slots(room) * g.slot_bytes, "walk")
        self._table = Table(pool, chosen(self_tests(plan.codecs or [BLANK], plan.query_heads, plan.dtype)))
        self._table.carry = Carry(plan.baggage) if plan.baggage is not None else None
        self._feed, self._heads = Feed(Network(model.model), plan.anatomy), plan.query_heads

    def read(self, ids: Sequence[int], chunk: int, rows: bool = True) -> np.ndarray:
        """Logarithms of what is predicted behind each of the next tokens, float32 [n, vocab]; without `rows` behind the last one.

        They are read `chunk` at a time: what lies further back is packed by then.
        """
        out = []
        for at in range(0, len(ids), chunk):
            part = list(ids[at : at + chunk])
            wanted = range(len(part)) if rows else [len(part) - 1]
            fed = self._feed.chunk(self._table, part, list(wanted))
            predicted = log_p(fed.logits)
            mx.eval(fed.arrays, predicted)
            fed.apply()
            out.append(np.array(predicted))
        return np.concatenate(out) if rows else out[-1]

    def say(self, first: np.ndarray, tokens: int, ends: Sequence[int]) -> list[int]:
        """A greedy reply behind what was read, of which `first` [1, vocab] are the predictions."""
        said: list[int] = []
        token = int(first[-1].argmax())
        while token not in ends and len(said) < tokens:
            said.append(token)
            self._table.reserve()
            fed = self._feed.step([self._table], mx.array([token]), [0], self._heads, None)
            mx.eval(fed.arrays, fed.logits)
            fed.apply([token], [0])
            token = int(np.array(fed.logits[0].astype(mx.float32)).argmax())
        return said

    def end(self) -> None:
        self._table.release()
