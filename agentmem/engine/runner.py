"""Forward passes: what runs the model over the tables of sequences."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from agentmem.engine import seam
from agentmem.engine.batch import DecodeStep, Plans
from agentmem.engine.draw import Chosen, Draw
from agentmem.engine.packing import PackedPass
from agentmem.engine.sequence import Sequence
from agentmem.errors import Overloaded
from agentmem.model.loaded import LoadedModel

Chunk = tuple[Sequence, list[int]]


@dataclass(frozen=True, slots=True)
class Work:
    """What one step feeds: the last token of those that decode, and chunks of prompts."""

    decoding: list[Sequence]
    chunks: list[Chunk]


class Runner:
    """Runs the model. Engine thread only. A pass that raises has changed no table.

    `fused`: decode steps take the fused path, which reads the packed pages of all sequences in one kernel. Where `batches`
    is False, the model does not take a position for each row: passes are of one sequence then.
    """

    def __init__(self, model: LoadedModel, query_heads: int, fused: bool) -> None:
        self.model, self.query_heads = model, query_heads
        self._plans = Plans() if fused else None
        self.batches = seam.takes_ragged_rows(model.model)

    def prefill(self, chunks: list[Chunk]) -> list[list[Chosen]]:
        """Feed chunks of prompts in one pass; returns the first token of each reply, or none where none is due.

        Raises Overloaded, changing nothing, when there are not the slots for all of them.
        """
        return [self._whole(*chunks[0])] if len(chunks) == 1 else self._packed(chunks)

    def _whole(self, sequence: Sequence, tokens: list[int]) -> list[Chosen]:
        table = sequence.table
        assert table is not None
        views = table.views()
        logits = self.model.model(mx.array([tokens]), cache=views)
        arrays, apply = table.absorb(views, tokens)
        due = sequence.generate and len(table) + len(tokens) >= len(sequence.ids)
        draw = Draw([sequence], logits[:, -1]) if due else None
        mx.eval(arrays, draw.arrays if draw is not None else [])
        apply()
        return draw.read(self.model.tokenizer.piece)[0] if draw is not None else []

    def _packed(self, chunks: list[Chunk]) -> list[list[Chosen]]:
        tables = [s.table for s, _ in chunks if s.table is not None]
        whole = PackedPass([(t, tokens) for t, (_, tokens) in zip(tables, chunks, strict=True)])
        views = whole.views()
        logits = self.model.model(whole.ids, cache=views)
        try:
            taken = [
                table.absorb(whole.rows_of(views, i), tokens)
                for i, (table, (_, tokens)) in enumerate(zip(tables, chunks, strict=True))
            ]
        except Overloaded:
            for table in tables:
                table.unreserve()
            raise
        due = [i for i, (s, t) in enumerate(chunks) if s.generate and len(tables[i]) + len(t) >= len(s.ids)]
        draw = Draw([chunks[i][0] for i in due], whole.last(logits)[mx.array(due)]) if due else None
        mx.eval([arrays for arrays, _ in taken], draw.arrays if draw is not None else [])
        for _, apply in taken:
            apply()
        chosen = iter(draw.read(self.model.tokenizer.piece) if draw is not None else [])
        return [next(chosen) if i in due else [] for i in range(len(chunks))]

    def decode(self, sequences: list[Sequence]) -> list[list[Chosen]]:
        """Feed each sequence its last token; returns the next ones, none for sequences that close.

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
            draw = Draw([sequences[i] for i in going], last)
            mx.eval(arrays, draw.arrays)
            chosen = iter(draw.read(self.model.tokenizer.piece))
        else:
            mx.eval(arrays)
        apply()
        return [[] if s.phase == "closing" else next(chosen) for s in sequences]
