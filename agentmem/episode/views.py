"""Views: the rows of a store that an episode keeps, as row ids, chosen by scoring what is there; nothing is read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.episode.held import Held
from agentmem.episode.line import Line
from agentmem.episode.passes import Scores, prompt_scores
from agentmem.episode.scores import CHUNK
from agentmem.episode.selection import Heads, Ids, selected
from agentmem.episode.store import RowStore, whole_line
from agentmem.model.network import Network


@dataclass(frozen=True, slots=True)
class View:
    """Of each layer the row ids of its heads, int32, head after head and ascending within one; `counts` int32 [heads] of them.

    Chosen among the rows of the first `tokens` tokens; pinned sinks are in every view and in no list.
    """

    ids: tuple[Ids, ...]
    counts: tuple[Ids, ...]
    tokens: int

    @classmethod
    def of(cls, held: Held) -> View:
        """What a cache holds after an eviction."""
        assert all(not line.tail.shape[1] for line in held.lines)
        lines = held.lines
        return cls(tuple(x.positions for x in lines), tuple(x.counts for x in lines), held.tokens)

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """As plain arrays and what JSON can say."""
        return (
            {"ids": np.concatenate(self.ids), "counts": np.stack(self.counts)},
            {"tokens": self.tokens},
        )

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> View:
        """The inverse of `arrays`."""
        counts = arrays["counts"].astype(np.int32)
        ends = np.cumsum(counts.sum(axis=1))[:-1]
        return cls(tuple(np.split(arrays["ids"], ends)), tuple(counts), int(meta["tokens"]))


def store_scores(network: Network, store: RowStore, prompt: Sequence[int], chunk: int = CHUNK) -> Scores:
    """All rows of the store but the sinks, scored by a prompt behind them; one layer of the store is in memory at a time."""
    lines = [lambda layer=layer: whole_line(store, layer) for layer in range(len(store.kinds))]
    return prompt_scores(network, lines, prompt, store.tokens, chunk)


def view_of(store: RowStore, scores: Scores, budgets: Sequence[int], heads: Heads = Heads.UNIFORM) -> View:
    """The best `budgets[layer]` rows a head, the sinks among them."""
    chosen = [selected(s, max(0, b - store.sinks), heads) for s, b in zip(scores, budgets, strict=True)]
    ids = tuple(np.concatenate(layer).astype(np.int32) + np.int32(store.sinks) for layer in chosen)
    counts = tuple(np.array([len(c) for c in layer], dtype=np.int32) for layer in chosen)
    return View(ids, counts, store.tokens)


def materialised(
    network: Network, store: RowStore, view: View, dtype: mx.Dtype, upto: int | None = None
) -> Held:
    """A view's rows side by side, moved as they are stored, and as its tail those of tokens that came after it, to `upto`."""
    stop = store.tokens if upto is None else upto
    lines = []
    for layer, kind in enumerate(store.kinds):
        heads = np.repeat(np.arange(kind.shape.heads), view.counts[layer])
        rows = store.rows(layer, store.sinks, view.tokens)
        body = rows[mx.array(heads), mx.array(view.ids[layer] - store.sinks)]
        tail = store.rows(layer, view.tokens, stop)
        line = Line(kind, store.lead(layer), body, view.counts[layer], view.ids[layer], tail, view.tokens)
        mx.eval(line.lead, line.body, line.tail)
        lines.append(line)
    return Held(network, lines, dtype, tokens=stop, sinks=store.sinks)
