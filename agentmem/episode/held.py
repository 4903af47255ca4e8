"""The cached rows of all layers: a conversation of any length in as many rows as its budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.episode.line import Line, empty_line
from agentmem.episode.passes import Fetch, Pass, Scores, prompt_scores
from agentmem.episode.rows import LayerKind
from agentmem.episode.scores import CHUNK
from agentmem.episode.selection import Heads, selected
from agentmem.model.network import Network

PIECE = 512
"""Tokens of a block that the model reads at once: the attention of one piece is in memory, not that of the block."""
SINKS = 4
"""First tokens that are pinned: attention falls back on them (StreamingLLM)."""


class Held:
    """`tokens` is the logical length, at which the next token stands; rows are those of `lines`, fewer after an eviction.

    Rows keep the positions of their tokens: keys were rotated for them and stay so.
    """

    def __init__(
        self, network: Network, lines: Sequence[Line], dtype: mx.Dtype, *, tokens: int = 0, sinks: int = SINKS
    ) -> None:
        self.network, self.dtype, self.sinks = network, dtype, sinks
        self.lines = list(lines)
        self.tokens = tokens

    @classmethod
    def empty(cls, network: Network, kinds: Sequence[LayerKind], dtype: mx.Dtype, sinks: int = SINKS) -> Held:
        return cls(network, [empty_line(k) for k in kinds], dtype, sinks=sinks)

    @property
    def nbytes(self) -> int:
        return sum(line.nbytes for line in self.lines)

    def most_rows(self) -> list[float]:
        """Rows a head of every layer, averaged over its heads."""
        return [line.held / line.heads for line in self.lines]

    def absorb(self, ids: Sequence[int], *, piece: int = PIECE, logits: bool = False) -> mx.array | None:
        """Read tokens behind the last one and keep their rows; returns the logits [vocab] behind the last on request."""
        out = None
        for start in range(0, len(ids), piece):
            some = list(ids[start : start + piece])
            last = logits and start + len(some) == len(ids)
            passes = [Pass(_at_hand(line), self.tokens) for line in self.lines]
            made = self.network.logits(
                mx.array([some], dtype=mx.int32), passes, [len(some) - 1] if last else []
            )
            pinned = min(max(0, self.sinks - self.tokens), len(some))
            for line, seen in zip(self.lines, passes, strict=True):
                line.append(seen.keys[0], seen.values[0], pinned)
            self.tokens += len(some)
            mx.eval(made if last else [], [(line.lead, line.tail) for line in self.lines])
            out = made[0] if last else None
        return out

    def predictions(self, batch: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> mx.array:
        """Logits of texts that each would follow here, [texts * longest, vocab] or of `rows` alone; nothing of them is kept."""
        longest = max(map(len, batch))
        ids = np.zeros((len(batch), longest), np.int32)
        for line, text in zip(ids, batch, strict=True):
            line[: len(text)] = text
        every = range(ids.size) if rows is None else rows
        passes = [Pass(_at_hand(line), self.tokens) for line in self.lines]
        return self.network.logits(mx.array(ids), passes, list(every))

    def score(self, prompt: Sequence[int], chunk: int = CHUNK) -> Scores:
        """Every row but the pinned ones, scored by a prompt that is read behind the last token and forgotten."""
        lines = [_at_hand(line) for line in self.lines]
        return prompt_scores(self.network, lines, prompt, self.tokens, chunk)

    def evict(self, scores: Scores, budgets: Sequence[int], heads: Heads = Heads.UNIFORM) -> None:
        """Keep `budgets[layer]` rows a head, the pinned ones among them."""
        for line, found, budget in zip(self.lines, scores, budgets, strict=True):
            room = max(0, budget - line.lead.shape[1])
            line.keep(selected(found, room, heads))
        mx.eval([line.body for line in self.lines])

    def over(self, budgets: Sequence[int]) -> bool:
        """Whether some layer has more rows than its budget."""
        return any(line.held > b * line.heads for line, b in zip(self.lines, budgets, strict=True))

    def drop(self, tokens: int) -> None:
        """Forget the last tokens; they are in the tail still."""
        self.lines = [line.cut(tokens) for line in self.lines]
        self.tokens -= tokens

    def copy(self) -> Held:
        """One that goes on by itself; arrays are shared."""
        lines = [line.cut(0) for line in self.lines]
        return Held(self.network, lines, self.dtype, tokens=self.tokens, sinks=self.sinks)

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """All of it as plain arrays and what JSON can say, for a checkpoint."""
        named = {f"{i}.{name}": a for i, line in enumerate(self.lines) for name, a in line.arrays().items()}
        return named, {"tokens": self.tokens, "sinks": self.sinks, "layers": len(self.lines)}

    @classmethod
    def of_arrays(
        cls, network: Network, kinds: Sequence[LayerKind], dtype: mx.Dtype,
        arrays: dict[str, np.ndarray], meta: dict[str, Any],
    ) -> Held:  # fmt: skip
        """The inverse of `arrays`, bit for bit. Raises ValueError for another number of layers."""
        if meta["layers"] != len(kinds):
            raise ValueError(f"a checkpoint of {meta['layers']} layers is not of this model of {len(kinds)}")
        lines = []
        for i, kind in enumerate(kinds):
            prefix = f"{i}."
            own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            lines.append(Line.of_arrays(kind, own))
        return cls(network, lines, dtype, tokens=int(meta["tokens"]), sinks=int(meta["sinks"]))


def _at_hand(line: Line) -> Fetch:
    return lambda: line
