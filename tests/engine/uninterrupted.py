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
from agentmem.engine.conversation import Conversation, Span
from agentmem.engine.layout import layout
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
        tested = self_tests(plan.codecs, plan.query_heads, plan.dtype)
        self.table = Table(self.pool, chosen(tested))
        self._query_heads, self._plans = plan.query_heads, Plans() if tested["fused"]["ok"] else None
        self._network = Network(model.model)
        self.conversation = Conversation(model.tokenizer)

    def _feed(self, tokens: list[int]) -> np.ndarray:
        views = self.table.views()
        logits = self._network.logits(mx.array([tokens]), views, [len(tokens) - 1])
        arrays, apply = self.table.absorb(views, tokens)
        last = logits[0].astype(mx.float32)
        mx.eval(arrays, last)
        apply()
        return np.array(last)

    def _say(self, token: int) -> np.ndarray:
        self.table.reserve()
        step = DecodeStep([self.table], self._query_heads, self._plans)
        views = step.views()
        logits = self._network.logits(mx.array([[token]]), views, [0])
        rows = [v.rows() for v in views]
        last = logits[0].astype(mx.float32)
        mx.eval(rows, last)
        assert not step.apply(rows, [token])
        return np.array(last)

    def turn(self, messages: list[dict[str, Any]], max_tokens: int) -> tuple[str, np.ndarray, int]:
        """Returns (reply, first logits, tokens fed for the prompt). The messages must extend those of the turn before."""
        text = self.model.tokenizer.render(messages)
        alignment = self.conversation.align(text)
        assert alignment.keep == len(self.conversation.ids), "the reference run never goes back"
        self.conversation.begin(alignment)
        ids, before = self.conversation.ids, len(self.table)
        while len(self.table) < len(ids):
            fed = len(self.table)
            rest = ids[fed : fed + self.chunk_tokens - fed % self.chunk_tokens]
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
