"""The run that was never interrupted: one page table, never settled, evicted, written or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from agentmem.blockpool.pool import Pool
from agentmem.engine.batch import DecodeStep, Plans
from agentmem.engine.carry import Carry, CarryStep, arrays_of
from agentmem.engine.checkpoints import stops
from agentmem.engine.conversation import Conversation, Span
from agentmem.engine.layout import BLANK, layout
from agentmem.engine.packing import GivenRows
from agentmem.engine.table import Table
from agentmem.model.loaded import LoadedModel
from agentmem.model.network import Network
from agentmem.quant.paths import chosen
from agentmem.quant.selftest import self_tests


class Recorder(Network):
    """A network that notes the last logits that each pass makes, float32 [vocab]."""

    def __init__(self, model: nn.Module, keep: list[np.ndarray]) -> None:
        super().__init__(model)
        self._keep = keep

    def logits(self, ids: mx.array, views: Sequence[Any], rows: Sequence[int]) -> mx.array:
        logits = super().logits(ids, views, rows)
        if len(rows):
            self._keep.append(np.array(logits[-1].astype(mx.float32)))
        return logits


class Uninterrupted:
    """Greedy turns of one conversation on one thread. `turn` returns (reply text, logits that chose its first token)."""

    def __init__(
        self, model: LoadedModel, *, format: str = "q4", page_tokens: int = 64, chunk_tokens: int = 512,
        calibrations: Path | None = None,
    ) -> None:  # fmt: skip
        self.model, self.chunk_tokens = model, chunk_tokens
        plan = layout(model, format, page_tokens, calibrations)
        self.pool = Pool(plan.geometry, 2000 * plan.geometry.slot_bytes, "uninterrupted")
        tested = self_tests(plan.codecs or [BLANK], plan.query_heads, plan.dtype)
        self.table = Table(self.pool, chosen(tested))
        self._query_heads, self._plans = (
            plan.query_heads,
            Plans() if tested["fused"]["ok"] and plan.attends else None,
        )
        self._network, self._anatomy = Network(model.model), plan.anatomy
        self.table.carry = Carry(plan.baggage) if plan.baggage is not None else None
        self.conversation = Conversation(model.tokenizer)

    def _feed(self, tokens: list[int]) -> np.ndarray:
        views, carry, n = self.table.views(), self.table.carry, len(tokens)
        held = carry.views() if carry is not None else []
        logits = self._network.logits(mx.array([tokens]), self._anatomy.caches(views, held), [n - 1])
        rows = views if self._anatomy.paged else [GivenRows(mx.zeros((n, BLANK.raw_words), mx.uint32))]
        arrays, apply = self.table.absorb(rows, tokens)
        states = carry.after(held, n) if carry is not None else ()
        last = logits[0].astype(mx.float32)
        mx.eval(arrays, last, arrays_of(states))
        apply()
        if carry is not None:
            carry.move(states, n)
        return np.array(last)

    def _stops(self, prompt: int) -> tuple[int, ...]:
        """Where the daemon takes a checkpoint, and so ends a pass."""
        known = len(self.table)
        return (
            stops(self.pool.geometry.page_tokens, known, known, prompt)
            if self.table.carry is not None
            else ()
        )

    def _say(self, token: int) -> np.ndarray:
        self.table.reserve()
        step = DecodeStep([self.table], self._query_heads, self._plans)
        views, carry = step.views(), self.table.carry
        held = CarryStep([carry]) if carry is not None else None
        caches = self._anatomy.caches(views, held.views() if held is not None else [])
        logits = self._network.logits(mx.array([[token]]), caches, [0])
        paged = bool(self._anatomy.paged)
        rows = [v.rows() for v in views] if paged else [mx.zeros((1, BLANK.raw_words), mx.uint32)]
        states = held.after() if held is not None else []
        last = logits[0].astype(mx.float32)
        mx.eval(rows, last, [arrays_of(s) for s in states])
        if carry is not None:
            carry.move(states[0], 1)
        assert not step.apply(rows, [token])
        return np.array(last)

    def turn(self, messages: list[dict[str, Any]], max_tokens: int) -> tuple[str, np.ndarray, int]:
        """Returns (reply, first logits, tokens fed for the prompt). The messages must extend those of the turn before."""
        text = self.model.tokenizer.render(messages)
        alignment = self.conversation.align(text)
        assert alignment.keep == len(self.conversation.ids), "the reference run never goes back"
        self.conversation.begin(alignment)
        ids, before = self.conversation.ids, len(self.table)
        cuts = self._stops(len(ids))
        while len(self.table) < len(ids):
            fed = len(self.table)
            end = min([fed + self.chunk_tokens - fed % self.chunk_tokens, *(n for n in cuts if n > fed)])
            rest = ids[fed:end]
            logits = self._feed(rest)
        first, prefilled = logits, len(ids) - before
        reply, end, decoder, out = [], [], self.model.tokenizer.detokenizer(), ""
        while True:
            token = int(np.argmax(logits))
            if token in self.model.tokenizer.eos_ids:
                end = [Span("end", self.model.tokenizer.special[token], [token])]
                break
            reply.append(token)
            out += decoder.add(token)
            logits = self._say(token)
            if len(reply) == max_tokens:
                break
        out += decoder.finish()
        self.conversation.add([Span("reply", out, reply), *end] if reply else end)
        return out, first, prefilled
