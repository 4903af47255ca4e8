"""Prompts that are prefilled in one pass give what each gives alone."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.engine.packing import PackedPass
from agentmem.engine.table import Table
from agentmem.model.network import Network
from agentmem.model.random import random_model
from tests.engine.test_batch import BOUND, HEADS, Bench


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(random_model("llama", seed=1, **HEADS["groups of two"]))


def packed(bench: Bench, chunks: list[tuple[Table, list[int]]]) -> np.ndarray:
    """Logits float32 behind each piece of one packed pass."""
    whole = PackedPass(chunks)
    views = whole.views()
    logits = Network(bench.model.model).logits(whole.ids, views, [p.last for p in whole.pieces])
    took = [t.absorb(whole.rows_of(views, i), tokens) for i, (t, tokens) in enumerate(chunks)]
    mx.eval(logits, [arrays for arrays, _ in took])
    for _, apply in took:
        apply()
    return np.array(logits.astype(mx.float32))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 70)), min_size=1, max_size=4), st.integers(0, 99)
)
def test_every_piece_is_as_if_alone(bench: Bench, pieces: list[tuple[int, int]], seed: int) -> None:
    rng = random.Random(seed)
    ids = [[rng.randrange(250) for _ in range(history + n)] for history, n in pieces]
    tables = [
        bench.prefilled(i[:h]) if h else Table(bench.pool, bench.path)
        for i, (h, _) in zip(ids, pieces, strict=True)
    ]
    alone = []
    for table, tokens, (history, _) in zip(tables, ids, pieces, strict=True):
        fork = table.fork()
        views = fork.views()
        logits = bench.model.model(mx.array([tokens[history:]]), cache=views)
        arrays, apply = fork.absorb(views, tokens[history:])
        mx.eval(arrays, logits)
        apply()
        alone.append((np.array(logits[0, -1].astype(mx.float32)), len(fork), [b.rows for b in fork.blocks]))
        fork.release()
    got = packed(bench, [(t, i[h:]) for t, i, (h, _) in zip(tables, ids, pieces, strict=True)])
    for table, logits, (want, length, blocks) in zip(tables, got, alone, strict=True):
        assert np.abs(logits - want).max() < BOUND
        assert (len(table), [b.rows for b in table.blocks]) == (length, blocks)
        table.release()
    bench.pool.check()
    assert bench.pool.used_bytes == 0


def test_what_follows_a_packed_prefill_is_as_if_alone(bench: Bench) -> None:
    prompts = [[(7 * i + k) % 250 for i in range(n)] for k, n in enumerate((40, 3, 100))]
    alone = [bench.prefilled(p) for p in prompts]
    together = [Table(bench.pool, bench.path) for _ in prompts]
    packed(bench, list(zip(together, prompts, strict=True)))
    for step in range(4):
        want, got = (bench.step(tables, [step + 1] * 3) for tables in (alone, together))
        assert np.array_equal(want.argmax(-1), got.argmax(-1))
    for table in [*alone, *together]:
        table.release()
