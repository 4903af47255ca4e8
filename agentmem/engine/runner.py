"""Forward passes: what runs the model over the tables of sequences."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import mlx.core as mx

from agentmem.engine.batch import Plans
from agentmem.engine.draw import Chosen, Draw
from agentmem.engine.feed import Feed
from agentmem.engine.launched import Launched, Outcome
from agentmem.engine.packing import PackedPass
from agentmem.engine.sequence import Sequence
from agentmem.errors import Overloaded
from agentmem.model import seam
from agentmem.model.anatomy import Anatomy
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network

log = logging.getLogger(__name__)

Chunk = tuple[Sequence, list[int]]


@dataclass(frozen=True, slots=True)
class Work:
    """What one step feeds: the last token of those that decode, and chunks of prompts."""

    decoding: list[Sequence]
    chunks: list[Chunk]


class Runner:
    """Runs the model. Engine thread only. A prefill pass that raises has changed no table.

    `anatomy` is that of the model. `fused`: decode steps take the fused path, which reads the packed pages of all sequences in
    one kernel. Where `batches` is False, the model does not take a position for each row: passes are of one sequence then.
    Only plain attention `packs` several prompts in one pass.
    """

    def __init__(self, model: LoadedModel, anatomy: Anatomy, fused: bool, looks_ahead: bool = True) -> None:
        self.model, self.query_heads = model, anatomy.query_heads
        self.network = Network(model.model)
        self.feed = Feed(self.network, anatomy)
        self._plans = Plans() if fused else None
        self.batches = seam.takes_ragged_rows(model.model)
        self.packs = self.batches and anatomy.plain
        self.looks_ahead = looks_ahead
        self._ahead: Launched | None = None

    def prefill(self, chunks: list[Chunk]) -> list[list[Chosen]]:
        """Feed chunks of prompts in one pass; returns the first token of each reply, or none where none is due.

        Raises Overloaded, changing nothing, when there are not the slots for all of them.
        """
        return [self._whole(*chunks[0])] if len(chunks) == 1 else self._packed(chunks)

    def _whole(self, sequence: Sequence, tokens: list[int]) -> list[Chosen]:
        table = sequence.table
        assert table is not None
        due = sequence.is_due(len(tokens))
        chunk = self.feed.chunk(table, tokens, [len(tokens) - 1] if due else [])
        draw = Draw([sequence], chunk.logits) if due else None
        mx.eval(chunk.arrays, draw.arrays if draw is not None else [])
        chunk.apply()
        if table.carry is not None:
            if table.carry.tokens in sequence.stops:
                table.carry.mark()
            if due:
                table.carry.anchor()
        return draw.read(self.model.tokenizer.piece)[0] if draw is not None else []

    def _packed(self, chunks: list[Chunk]) -> list[list[Chosen]]:
        tables = [s.table for s, _ in chunks if s.table is not None]
        whole = PackedPass([(t, tokens) for t, (_, tokens) in zip(tables, chunks, strict=True)])
        views = whole.views()
        due = [i for i, (s, tokens) in enumerate(chunks) if s.is_due(len(tokens))]
        logits = self.network.logits(whole.ids, views, [whole.pieces[i].last for i in due])
        try:
            taken = [
                table.absorb(whole.rows_of(views, i), tokens)
                for i, (table, (_, tokens)) in enumerate(zip(tables, chunks, strict=True))
            ]
        except Overloaded:
            for table in tables:
                table.unreserve()
            raise
        draw = Draw([chunks[i][0] for i in due], logits) if due else None
        mx.eval([arrays for arrays, _ in taken], draw.arrays if draw is not None else [])
        for _, apply in taken:
            apply()
        chosen = iter(draw.read(self.model.tokenizer.piece) if draw is not None else [])
        return [next(chosen) if i in due else [] for i in range(len(chunks))]

    def decode(self, sequences: list[Sequence]) -> list[Outcome]:
        """Feed sequences their last tokens; returns the next ones, none for those that close, or why one alone has failed.

        Precondition: every table has reserved the slots that it needs. While the device is at it, the step after it is built
        from the tokens to come. What joins meanwhile has its first step after that one, and no outcome now. Raises what the
        model raises, and then tables may have their rows: their lengths tell.
        """
        ahead, self._ahead = self._ahead, None
        kept = ahead.still(sequences) if ahead is not None else []
        if ahead is None or not kept:
            ahead, kept = self._launch(sequences, None, []), list(range(len(sequences)))
        members = [ahead.sequences[i] for i in kept]
        following = self._following(sequences, members)
        if not following:
            ahead.wait()
        failures = ahead.apply(kept)
        if following:
            pending = [s for s in following if s in members]
            self._ahead = self._launch_ahead(following, ahead, pending)
        return ahead.read(kept, failures, self.model.tokenizer.piece)

    def rest(self) -> None:
        """Nobody decodes: let go of a step that nobody waits for."""
        self._ahead = None

    def _following(self, sequences: list[Sequence], members: list[Sequence]) -> list[Sequence]:
        """Who will be in the step after this one of `members`, as far as can be told now; nobody when it cannot be built yet.

        A page that fills must be packed before it is read, and a penalty must know what was said.
        """
        if not self.looks_ahead:
            return []
        following = []
        for sequence in sequences:
            assert sequence.table is not None
            assert sequence.sampler is not None
            if sequence in members:
                if sequence.table.fills or not sequence.sampler.forgetful:
                    return []
                if sequence.phase == "closing" or sequence.position + 1 >= sequence.max_tokens:
                    continue
            following.append(sequence)
        return following

    def _launch_ahead(
        self, sequences: list[Sequence], before: Launched, pending: list[Sequence]
    ) -> Launched | None:
        """The step after `before`; when it cannot be built, it is tried again in its turn, and fails then."""
        try:
            return self._launch(sequences, before, pending)
        except Exception:
            log.warning("a decode step could not be built ahead of its turn", exc_info=True)
            return None

    def _launch(
        self, sequences: list[Sequence], before: Launched | None, pending: list[Sequence]
    ) -> Launched:
        """Start a step. `before` is drawing the last tokens of `pending`; the other sequences have theirs."""
        tokens = mx.array([s.last if s not in pending else 0 for s in sequences])
        if before is not None and before.draw is not None and pending:
            at = [i for i, s in enumerate(sequences) if s in pending]
            known = before.draw.tokens[mx.array([before.drawn.index(s) for s in pending])]
            tokens[mx.array(at)] = known.astype(tokens.dtype)
        tables = [s.table for s in sequences if s.table is not None]
        at = [i for i, s in enumerate(sequences) if s.phase != "closing"]
        fed = self.feed.step(tables, tokens, at, self.query_heads, self._plans)
        drawn = [sequences[i] for i in at]
        draw = Draw(drawn, fed.logits, pending) if drawn else None
        launched = Launched(sequences, [len(t) for t in tables], fed, drawn, draw)
        mx.async_eval(launched.arrays)
        return launched
