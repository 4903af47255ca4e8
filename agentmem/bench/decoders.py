"""Streams that decode one token a step: over our pages, and as stock mlx-lm does it.

No prompt is run. Histories are random finite rows: how long a decode step takes does not depend on their values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, GenerationBatch, StopSequences, generate_step, generation_stream
from mlx_lm.models.cache import BatchKVCache, KVCache
from mlx_lm.sample_utils import greedy_sampler

from agentmem.blockpool.geometry import Geometry
from agentmem.blockpool.pool import Pool
from agentmem.engine.layout import layout
from agentmem.engine.reply import Reply
from agentmem.engine.request import ChatRequest, Sampling, Ticket
from agentmem.engine.runner import Runner
from agentmem.engine.sampler import Sampler
from agentmem.engine.sequence import Sequence
from agentmem.engine.table import Block, Table
from agentmem.model.loaded import LoadedModel
from agentmem.quant.paths import chosen
from agentmem.quant.selftest import self_tests

PAGE = 64
FILL_PAGES = 64
FIRST_TOKEN = 1


class Decoder(Protocol):
    """Several streams over histories of equal length, greedy, each fed what it said."""

    def step(self) -> None:
        """One more token of every stream; they are known when it returns."""
        ...

    def wait(self) -> None:
        """Return when nothing runs any more: stock mlx-lm computes a step ahead, which would run beside the next contender."""
        ...

    def close(self) -> None: ...


class Format:
    """A model with a KV format: how its pages lie, and what the self-test admits here. `folder` keeps calibrations."""

    def __init__(self, model: LoadedModel, name: str, folder: Path | None) -> None:
        self.model = model
        plan = layout(model, name, PAGE, folder)
        self.geometry: Geometry = plan.geometry
        tested = self_tests(plan.codecs, plan.query_heads, plan.dtype)
        self.path = chosen(tested)
        self.fused = bool(tested["fused"]["ok"])
        self.query_heads, self.dtype = plan.query_heads, plan.dtype
        self.runner = Runner(model, plan.anatomy, self.fused)


class Paged:
    """Streams over pages of a format, through the engine's own runner. `steps`: tokens there is room for."""

    def __init__(self, format: Format, batch: int, tokens: int, steps: int) -> None:
        g = format.geometry
        self._runner = format.runner
        self._pool = Pool(g, batch * g.worst_slots(tokens + steps) * g.slot_bytes, "bench")
        tables = [Table(self._pool, format.path) for _ in range(batch)]
        for table in tables:
            fill(table, tokens)
        self._sequences = [_sequence(format.model, table) for table in tables]

    def step(self) -> None:
        for sequence in self._sequences:
            assert sequence.table is not None
            sequence.table.reserve()
        for sequence, drawn in self._runner.decode(self._sequences):
            assert not isinstance(drawn, Exception)
            sequence.last = drawn[0].token

    def wait(self) -> None:
        mx.synchronize()

    def close(self) -> None:
        self._runner.rest()  # the step ahead holds the pool
        for sequence in self._sequences:
            assert sequence.table is not None
            sequence.table.release()


def fill(table: Table, tokens: int) -> None:
    """Give an empty table the state of `tokens` tokens, whole pages of random rows that are the same in all of them."""
    g, arena = table.pool.geometry, table.pool.arena
    rows = [mx.random.normal((PAGE, 2 * c.raw_words)).astype(c.stored).view(mx.uint32) for c in g.codecs]
    packed = [c.pack(r) for c, r in zip(g.codecs, rows, strict=True)]
    mx.eval(rows, packed)
    format, pages = g.format, tokens // PAGE
    lead = 1 if format.packs and format.raw_first_page else 0
    blocks = [(table.pool.take(g.slots_for(True, PAGE)), True) for _ in range(lead)]
    for slots, _ in blocks:
        arena.write_raw(slots, rows)
    # Rows of a format that does not pack lie in a slot as packed ones would.
    rest = [table.pool.take(1)[0] for _ in range(pages - lead)]
    for at in range(0, len(rest), FILL_PAGES):
        part = rest[at : at + FILL_PAGES]
        several = [mx.tile(p, (len(part), 1)) for p in packed]
        mx.eval(several)
        arena.write_packed(part, several)
    blocks += [((slot,), not format.packs) for slot in rest]
    ids = np.full(PAGE, FIRST_TOKEN, np.int32)
    table.blocks += [Block(slots, raw, ids) for slots, raw in blocks]


def _sequence(model: LoadedModel, table: Table) -> Sequence:
    """A sequence in the midst of a greedy reply over what the table holds."""
    request = ChatRequest("bench", [{"role": "user", "content": "."}])
    return Sequence(
        request, Ticket(), lambda _: None, phase="decode", table=table, last=FIRST_TOKEN,
        reply=Reply(model.tokenizer.detokenizer(), []), sampler=Sampler(Sampling(), 0),
        max_tokens=model.max_context,
    )  # fmt: skip


def _arrays(
    geometry: Geometry, dtype: mx.Dtype, batch: int, tokens: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """Random keys and values of every layer, [batch, heads, tokens, dim] each."""
    for codec in geometry.codecs:
        shape = codec.shape
        pair = (
            mx.random.normal((batch, shape.heads, tokens, shape.key_dim), dtype=dtype),
            mx.random.normal((batch, shape.heads, tokens, shape.value_dim), dtype=dtype),
        )
        mx.eval(pair)
        yield pair


def _room(tokens: int) -> int:
    """Rows of a stock cache that holds `tokens` tokens; made at once, so that it does not grow while it is timed."""
    step = KVCache.step
    return -(-tokens // step) * step


class Batched:
    """mlx-lm's `BatchGenerator` in mid-reply, its cache in the model's own precision."""

    def __init__(self, format: Format, batch: int, tokens: int, steps: int) -> None:
        caches = []
        for keys, values in _arrays(format.geometry, format.dtype, batch, _room(tokens + steps)):
            cache = BatchKVCache([0] * batch)
            cache.state = (keys, values, mx.array([tokens] * batch), mx.array([0] * batch), tokens)
            caches.append(cache)
        model = format.model.model
        self._generator = BatchGenerator(model, completion_batch_size=batch, prefill_batch_size=batch)
        with mx.stream(self._generator.stream):
            self._generator._generation_batch.extend(
                GenerationBatch(
                    model, list(range(batch)), mx.array([FIRST_TOKEN] * batch), caches, [[] for _ in range(batch)],
                    [greedy_sampler] * batch, greedy_sampler, [[] for _ in range(batch)], [StopSequences()] * batch,
                    [1 << 30] * batch,
                )
            )  # fmt: skip

    def step(self) -> None:
        self._generator.next()

    def wait(self) -> None:
        mx.synchronize(self._generator.stream)

    def close(self) -> None:
        self._generator.close()


class Single:
    """mlx-lm's `generate_step`, which is what `stream_generate` runs: one stream and no mask."""

    def __init__(self, format: Format, tokens: int, steps: int) -> None:
        caches: list[Any] = []
        for keys, values in _arrays(format.geometry, format.dtype, 1, _room(tokens + steps)):
            cache = KVCache()
            cache.state = (keys, values, tokens)
            caches.append(cache)
        self._tokens = generate_step(
            mx.array([FIRST_TOKEN]), format.model.model, max_tokens=1 << 30, prompt_cache=caches
        )

    def step(self) -> None:
        next(self._tokens)

    def wait(self) -> None:
        mx.synchronize(generation_stream)

    def close(self) -> None:
        self._tokens.close()
