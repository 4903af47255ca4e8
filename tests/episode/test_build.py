"""Reading within a budget: never more rows than a budget and a block, and every block may be the last before a restart."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from agentmem.episode.baselines import KeyDiff, KVzip, Policy, Prompted, Random, SnapKV, Streaming
from agentmem.episode.budgets import allotted
from agentmem.episode.build import Builder, Plan
from agentmem.episode.held import Held
from agentmem.episode.selection import Heads
from agentmem.errors import ContextOverflow
from tests.episode.state import BOTH, World, same, text, world_of

PROMPT = tuple(text(16, seed=1))
POLICIES: dict[str, Policy] = {
    "prompted": Prompted(PROMPT), "snapkv": SnapKV(8), "kvzip": KVzip(tuple(text(5, seed=3)), piece=12),
    "streaming": Streaming(), "keydiff": KeyDiff(), "random": Random(7),
}  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    return world_of()


def builder(
    world: World, ids: list[int], policy: Policy, plan: Plan, format: str = "whole", limit: int = 8192
) -> Builder:
    return Builder(
        world.network, world.kinds[format], world.model.dtype, ids, policy, plan, max_context=limit
    )


@pytest.mark.parametrize("heads", BOTH)
@pytest.mark.parametrize("name", POLICIES)
def test_rows_stay_within_a_budget_and_a_block(world: World, name: str, heads: Heads) -> None:
    budgets = tuple(allotted([0.0, 0.2, 0.4], 20))
    made = builder(world, text(130), POLICIES[name], Plan(budgets, 24, heads))
    while not made.done:
        before = made.held.tokens
        made.step()
        assert made.held.tokens == min(before + 24, 130)
        assert made.held.most_rows() == [min(b, made.held.tokens) for b in budgets]
    assert sum(made.held.most_rows()) == 3 * 20
    assert made.most == [min(b, 120) + 24 for b in budgets[:2]] + [budgets[2] + 24]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_history(world: World) -> None:
    """4 to 50 budgets of history: as many rows and bytes at the most, and at the end."""
    found = []
    for times in (4, 16, 50):
        made = builder(
            world, text(times * 16), Prompted(PROMPT[:6]), Plan((16,) * 3, 32, Heads.RAGGED), "q4-plain"
        )
        held = made.run()
        found.append((made.most, held.most_rows(), held.nbytes))
        assert held.tokens == times * 16
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("heads", BOTH)
@pytest.mark.parametrize("extra", [0, 1000])
def test_a_budget_of_the_whole_history_is_the_full_cache(world: World, heads: Heads, extra: int) -> None:
    ids, ask = text(90), text(9, seed=4)
    held = builder(world, ids, POLICIES["prompted"], Plan((90 + extra,) * 3, 16, heads)).run()
    full = world.held()
    for start in range(0, 90, 16):
        full.absorb(ids[start : start + 16], piece=16)
    assert same(held, full)
    wanted, got = world.logits(ids + ask)[90:], held.predictions([ask])
    assert mx.abs(got - wanted).max() < 1e-3
    said: list[list[int]] = []
    for cache in (held.copy(), full):
        replies, fed = [], ask
        for _ in range(12):
            logits = cache.absorb(fed, logits=True)
            assert logits is not None
            replies.append(int(logits.argmax().item()))
            fed = replies[-1:]
        said.append(replies)
    assert said[0] == said[1]


@pytest.mark.parametrize("format", ["whole", pytest.param("q4-plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", POLICIES)
def test_a_build_goes_on_where_it_was_stopped(world: World, name: str, format: str) -> None:
    ids, plan, policy = text(100), Plan((18, 20, 22), 24, Heads.RAGGED), POLICIES[name]
    straight = builder(world, ids, policy, plan, format).run()
    made = builder(world, ids, policy, plan, format)
    while not made.step():
        arrays, meta = made.checkpoint()
        made = Builder.resumed(
            world.network, world.kinds[format], world.model.dtype, ids, policy, plan, arrays,
            json.loads(json.dumps(meta)), max_context=8192,
        )  # fmt: skip
    assert same(made.held, straight)


def test_a_checkpoint_of_something_else_is_refused(world: World) -> None:
    ids, plan = text(60), Plan((20,) * 3, 24)
    made = builder(world, ids, POLICIES["prompted"], plan)
    made.step()
    arrays, meta = made.checkpoint()
    for other_ids, other_plan in ((ids[:50], plan), (ids, Plan((21,) * 3, 24))):
        with pytest.raises(ValueError, match="another history"):
            Builder.resumed(
                world.network, world.kinds["whole"], world.model.dtype, other_ids, POLICIES["prompted"],
                other_plan, arrays, meta, max_context=8192,
            )  # fmt: skip


def test_positions_beyond_the_trained_range_are_refused_before_any_work(world: World) -> None:
    plan = Plan((20,) * 3, 24)
    builder(world, text(100), Prompted(PROMPT), plan, limit=116)
    with pytest.raises(ContextOverflow, match="115 positions"):
        builder(world, text(100), Prompted(PROMPT), plan, limit=115)
    with pytest.raises(ContextOverflow):
        builder(world, text(100), KVzip((1, 2)), plan, limit=125)
    builder(world, text(100), Streaming(), plan, limit=100)


@pytest.mark.parametrize(("budgets", "block"), [((4, 20, 20), 24), ((20, 20, 20), 0)])
def test_a_plan_that_cannot_be_is_refused(budgets: tuple[int, ...], block: int) -> None:
    with pytest.raises(ValueError, match=r"budget|block"):
        Plan(budgets, block)


def kept(held: Held) -> list[list[int]]:
    return [p.tolist() for p in held.lines[1].candidate_positions()]


def test_streaming_keeps_sinks_and_the_newest(world: World) -> None:
    held = builder(world, text(100), Streaming(), Plan((20,) * 3, 24)).run()
    assert kept(held) == [list(range(84, 100))] * 2
    assert held.lines[0].lead.shape[1] == 4


def test_random_rows_are_those_of_the_seed(world: World) -> None:
    ids, plan = text(100), Plan((20,) * 3, 24)
    one, again, other = (kept(builder(world, ids, Random(seed), plan).run()) for seed in (1, 1, 2))
    assert one == again != other
    assert one[0] != one[1]


def test_keydiff_prefers_keys_unlike_the_mean_of_their_head(world: World) -> None:
    """Heads do not mix, and room counts for nothing."""
    held = world.read(text(40))
    held.evict(Streaming().score(held, []), [20] * 3)
    line = held.lines[1]
    keys, _, _ = line.past(mx.float32)
    for head, got in enumerate(KeyDiff().score(held, [])[1]):
        unit = keys[head] / mx.linalg.norm(keys[head], axis=-1, keepdims=True)
        mean = unit.mean(axis=0)
        wanted = -(unit @ mean) / mx.linalg.norm(mean)
        assert mx.abs(wanted[4:] - mx.array(got)).max() < 1e-5


def test_what_scores_by_a_prompt_reads_what_it_says(world: World) -> None:
    held = world.read(text(40))
    block = text(40)[-20:]
    assert all(
        (a == b).all()
        for one, other in (
            (SnapKV(8).score(held, block), held.score(block[-8:])),
            (KVzip((1, 2, 3)).score(held, block), held.score([1, 2, 3, *block])),
        )
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    in_pieces = KVzip((1,), piece=12).score(held, block)
    for got, x, y in zip(in_pieces, held.score([1, *block[:12]]), held.score([1, *block[12:]]), strict=True):
        assert all(
            (g == mx.maximum(mx.array(a), mx.array(b))).all() for g, a, b in zip(got, x, y, strict=True)
        )
