"""Forward passes: what runs the model over the tables of sequences."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from agentmem.engine.batch import DecodeStep, Plans
from agentmem.engine.sampler import choose_batch
from agentmem.engine.sequence import Sequence
from agentmem.model.loaded import LoadedModel


class Runner:
    """Runs the model. Engine thread only. A pass that raises has changed no table.

    `fused`: decode steps take the fused path, which reads the packed pages of all sequences in one kernel.
    """

    def __init__(self, model: LoadedModel, query_heads: int, fused: bool) -> None:
        self.model, self.query_heads = model, query_heads
        self._plans = Plans() if fused else None

    def prefill(self, sequence: Sequence, tokens: list[int]) -> int | None:
        """Feed a chunk of one prompt; returns the first token of the reply, or None where none is due."""
        table = sequence.table
        assert table is not None
        views = table.views()
        logits = self.model.model(mx.array([tokens]), cache=views)
        arrays, apply = table.absorb(views, tokens)
        due = sequence.generate and len(table) + len(tokens) >= len(sequence.ids)
        token = self._choose([sequence], logits[:, -1]) if due else None
        mx.eval(arrays, *([token] if token is not None else []))
        apply()
        return int(np.array(token)[0]) if token is not None else None

    def decode(self, sequences: list[Sequence]) -> list[int | None]:
        """Feed each sequence its last token; returns the next ones, None for sequences that close.

        Precondition: every table has reserved the slots that it needs.
        """
        tables = [s.table for s in sequences if s.table is not None]
        tokens = [s.last for s in sequences if s.last is not None]
        step = DecodeStep(tables, self.query_heads, self._plans)
        views = step.views()
        logits = self.model.model(mx.array(tokens)[:, None], cache=views)
        arrays, apply = step.absorb(views, tokens)
        going = [i for i, s in enumerate(sequences) if s.phase != "closing"]
        if going:
            last = logits[:, -1] if len(going) == len(sequences) else logits[mx.array(going), -1]
            chosen = self._choose([sequences[i] for i in going], last)
            mx.eval(arrays, chosen)
            ids = iter(np.array(chosen))
        else:
            mx.eval(arrays)
        apply()
        return [None if s.phase == "closing" else int(next(ids)) for s in sequences]

    @staticmethod
    def _choose(sequences: list[Sequence], logits: mx.array) -> mx.array:
        """The next token of each, lazily: logits [B, vocab] -> [B]."""
        samplers = [s.sampler for s in sequences if s.sampler is not None]
        positions = [len(s.reply.tokens) for s in sequences if s.reply is not None]
        return choose_batch(samplers, logits, positions)
