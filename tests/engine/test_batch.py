"""Sequences that decode together say what each says alone, whoever joins and leaves between the steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from agentmem.blockpool.page import Page
from agentmem.blockpool.pool import Pool
from agentmem.engine.batch import DecodeStep, Plans
from agentmem.engine.layout import layout
from agentmem.engine.table import Table
from agentmem.home import default_home
from agentmem.model.loaded import LoadedModel, load
from agentmem.model.random import random_model
from agentmem.quant.attention import Path as Attention
from agentmem.quant.device import backend
from agentmem.quant.paths import chosen
from agentmem.quant.selftest import self_tests

PAGE = 32
BOUND = 1e-4 if backend() == "cpu" else 2e-2
"""Of a logit: the fused path multiplies in float16."""
HEADS = {
    "one KV head each": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "groups of two": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "one KV head for all": {"num_attention_heads": 4, "num_key_value_heads": 1},
}
KINDS = ("llama", "qwen3")


class Alone:
    """A conversation on a table of its own: its tokens, and the logits behind each, float32 [vocab]."""

    def __init__(self, bench: Bench, prompt: list[int], steps: int) -> None:
        self.prompt, self.tokens, self.logits = prompt, list[int](), list[np.ndarray]()
        table = bench.prefilled(prompt)
        self.logits.append(bench.last)
        for _ in range(steps):
            self.tokens.append(int(np.argmax(self.logits[-1])))
            self.logits.append(bench.step([table], [self.tokens[-1]])[0])
        table.release()


class Bench:
    """A model with a pool, and the passes that a runner makes."""

    def __init__(self, model: LoadedModel, format: str = "q4-plain", page_tokens: int = PAGE) -> None:
        self.model, plan = model, layout(model, format, page_tokens)
        self.pool = Pool(plan.geometry, 400 * plan.geometry.slot_bytes, "batch")
        tested = self_tests(plan.codecs, plan.query_heads, plan.dtype)
        self.path: Attention = chosen(tested)
        self.anatomy, self.query_heads = plan.anatomy, plan.query_heads
        self.plans = Plans() if tested["fused"]["ok"] else None
        self.last = np.zeros(0)

    def prefilled(self, prompt: Sequence[int]) -> Table:
        table = Table(self.pool, self.path)
        views = table.views()
        logits = self.model.model(mx.array([list(prompt)]), cache=views)
        arrays, apply = table.absorb(views, list(prompt))
        mx.eval(arrays, logits)
        apply()
        self.last = np.array(logits[0, -1].astype(mx.float32))
        return table

    def step(self, tables: list[Table], tokens: list[int]) -> np.ndarray:
        """Logits float32 [B, vocab] behind one more token of each."""
        for table in tables:
            table.reserve()
        step = DecodeStep(tables, self.query_heads, self.plans)
        views = step.views()
        logits = self.model.model(mx.array(tokens)[:, None], cache=views)
        rows = [v.rows() for v in views]
        mx.eval(rows, logits)
        assert not step.apply(rows, tokens)
        return np.array(logits[:, -1].astype(mx.float32))


def schedules(bench: Bench, alone: list[Alone], count: int, rng: random.Random) -> float:
    """Run `count` random schedules of joins, leaves and pauses. Every step is compared with steps of each sequence alone, from
    the same state; returns the largest difference of a logit. Tokens are those of the run that was always alone: its state
    may differ in the last bit of a stored row, and so its logits by more.
    """
    worst = 0.0
    for _ in range(count):
        running: list[tuple[Alone, Table, int]] = []
        waiting = rng.sample(alone, rng.randint(2, min(6, len(alone))))
        while waiting or running:
            while waiting and (not running or rng.random() < 0.5):
                one = waiting.pop()
                running.append((one, bench.prefilled(one.prompt), 0))
            rng.shuffle(running)
            n = rng.randint(1, len(running))
            tokens = [one.tokens[at] for one, _, at in running[:n]]
            forks = [t.fork() for _, t, _ in running[:n]]
            singly = [bench.step([f], [token])[0] for f, token in zip(forks, tokens, strict=True)]
            for fork in forks:
                fork.release()
            got = bench.step([t for _, t, _ in running[:n]], tokens)
            worst = max(worst, float(np.abs(got - np.stack(singly)).max()))
            for i, (one, table, at) in enumerate(running[:n]):
                assert int(np.argmax(got[i])) == int(np.argmax(one.logits[at + 1]))
                running[i] = (one, table, at + 1)
            for one, table, at in list(running):
                if at == len(one.tokens) or rng.random() < 0.1:
                    running.remove((one, table, at))
                    table.release()
        bench.pool.check()
        assert bench.pool.tails.used == 0
    return worst


def conversations(bench: Bench, rng: random.Random, lengths: Sequence[int], steps: int) -> list[Alone]:
    vocab = 250  # the least that a model here has
    common = [rng.randrange(vocab) for _ in range(max(lengths))]
    prompts = [
        common[:n] if rng.random() < 0.5 else [rng.randrange(vocab) for _ in range(n)] for n in lengths
    ]
    return [Alone(bench, p, steps) for p in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_random_joins_and_leaves(kind: str, heads: dict[str, int]) -> None:
    bench, rng = Bench(random_model(kind, seed=1, **heads)), random.Random(5)
    alone = conversations(bench, rng, [1, 5, 31, 33, 40], 6)
    assert schedules(bench, alone, 5, rng) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_eighty_four_random_schedules_each(kind: str, heads: dict[str, int]) -> None:
    bench, rng = Bench(random_model(kind, seed=1, **heads)), random.Random(7)
    alone = conversations(bench, rng, [1, 2, 9, 30, 31, 32, 33, 63, 64, 65, 100], 12)
    assert schedules(bench, alone, 84, rng) < BOUND


@pytest.mark.slow
def test_the_embedded_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    bench, rng = Bench(load("embedded", default_home()), "q4-plain", 64), random.Random(9)
    alone = conversations(bench, rng, [3, 63, 64, 130], 8)
    assert schedules(bench, alone, 2, rng) < BOUND


def test_joining_and_leaving_copies_no_state() -> None:
    bench = Bench(random_model("llama", seed=1))
    rng = random.Random(3)
    prompts = [[rng.randrange(200) for _ in range(n)] for n in (300, 200, 100)]
    tables = [bench.prefilled(p) for p in prompts]
    slots = [[b.slots for b in t.blocks] for t in tables]
    arena = [bench.pool.arena.layer(i) for i in range(2)]
    bytes_of = bench.pool.used_bytes
    for together in ([0, 1], [1, 2], [0, 1, 2], [2]):
        bench.step([tables[i] for i in together], [1] * len(together))
        assert bench.pool.used_bytes == bytes_of
    assert [[b.slots for b in t.blocks] for t in tables] == slots
    assert len(arena) == 2
    for table in tables:
        table.release()
    assert bench.pool.used_bytes == 0
    assert bench.pool.tails.bytes == 0


def test_a_page_that_fills_during_decode_is_packed_once() -> None:
    bench = Bench(random_model("llama", seed=1))
    table, other = bench.prefilled(range(PAGE - 1)), bench.prefilled(range(3))
    for token in range(2 * PAGE):
        bench.step([table, other], [token % 50, token % 40])
    assert [b.rows for b in table.blocks] == [PAGE] * 2
    assert len(table) == 3 * PAGE - 1
    root: Page = bench.pool.tree("n").root
    assert table.settle(root).end == 3 * PAGE - 1
    other.release()
