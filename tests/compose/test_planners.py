"""Plans: what is read, what is put, and how far the predictions are off."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from agentmem.compose import planners
from agentmem.compose.anchors import Eviction, Pool
from agentmem.compose.blend import Rows, blend, selected
from agentmem.compose.offsets import Kriging, Paper
from agentmem.compose.planners import Kvcomm, Piece, Put, Read
from agentmem.errors import ModelUnavailable
from agentmem.model import seam
from agentmem.model.network import Network
from agentmem.model.random import random_model
from tests.compose.prompts import Stage, apart, divergence, stage, states_apart

TEXTS = [
    ("How much oil is left in the tank after the storm?", "Nine barrels, less one that leaked."),
    ("Who wound the clock while the keeper slept below?", "The boy did, twice, by the north window."),
    ("Why did the lamp go out before the tide had turned?", "A wet wick, and nobody to trim it then."),
    ("When does the boat come with the bread and letters?", "On the first calm day of the week, at noon."),
    ("What does the log say of the ship behind the reef?", "Two masts, no flag, and a light at her stern."),
    (
        "Where are the spare panes kept in this lighthouse?",
        "Under the stairs, wrapped in sailcloth and straw.",
    ),
]
ASKED = ("How many steps lead up to the lamp?", "One hundred and twelve.")


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> Stage:
    return stage(request.param, layers=4)


@pytest.fixture(scope="module")
def asked(world: Stage) -> list[Piece]:
    return world.pieces(*ASKED)


def taught(world: Stage, eviction: Eviction = Eviction.DECAYED) -> Pool:
    pool = Pool(1 << 30, eviction=eviction)
    for question, answer in TEXTS:
        pieces = world.pieces(question, answer)
        planners.observe(pool, pieces, world.read(pieces)[0], "judge")
    return pool


@pytest.fixture(scope="module")
def pool(world: Stage) -> Pool:
    return taught(world)


def tokens(pieces: list[Piece]) -> list[int]:
    return [i for p in pieces for i in p.ids]


def test_all_plans_are_of_the_same_tokens(world: Stage, asked: list[Piece], pool: Pool) -> None:
    plans = [
        planners.dense(asked), planners.exact(asked), planners.repositioned(asked), planners.lego(asked),
        Kvcomm(pool, "judge").plan(asked), Kvcomm(pool, "judge", read_tail=False).plan(asked),
    ]  # fmt: skip
    for plan in plans:
        assert plan is not None
        assert isinstance(plan[-1], Read)
        prompt, _ = world.follow(plan)
        assert prompt.ids == tokens(asked)
        assert prompt.read_tokens == sum(len(s.ids) for s in plan if isinstance(s, Read))
        assert all(line.offset == len(prompt) for line in prompt.lines)


def test_lego_reads_fixed_text_and_where_slots_begin(asked: list[Piece]) -> None:
    plan = planners.lego(asked, first=5)
    assert [(type(s).__name__, len(s.ids)) for s in planners.merged(plan)] == [
        ("Put", len(asked[0].ids)),
        ("Read", 5),
        ("Put", len(asked[1].ids) - 5),
        ("Read", len(asked[2].ids) + 5),
        ("Put", len(asked[3].ids) - 5),
        ("Read", len(asked[4].ids)),
    ]


def test_lego_that_reads_whole_slots_is_the_dense_prompt(world: Stage, asked: list[Piece]) -> None:
    logits = world.read(asked)[1]
    assert apart(world.follow(planners.lego(asked, first=999))[1], logits) < 1e-3


def test_too_few_anchors_are_no_plan(world: Stage, asked: list[Piece], pool: Pool) -> None:
    assert Kvcomm(pool, "judge", minimum=len(TEXTS)).plan(asked) is not None
    assert Kvcomm(pool, "judge", minimum=len(TEXTS) + 1).plan(asked) is None
    assert Kvcomm(pool, "a stranger").plan(asked) is None
    longer = world.pieces(ASKED[0] * 3, ASKED[1])
    assert Kvcomm(pool, "judge", minimum=1, offsets=Paper()).plan(asked) is None, (
        "traits are too little for it"
    )
    aligned = Kvcomm(taught(world, Eviction.PAPER), "judge", minimum=1, offsets=Paper())
    assert aligned.plan(longer) is None, "no anchor is as long as its question"
    assert aligned.plan(asked) is not None
    assert Kvcomm(pool, "judge", minimum=1).plan(longer) is not None


def test_a_text_that_is_its_own_anchor_needs_no_other(world: Stage, asked: list[Piece]) -> None:
    pool = Pool(1 << 30)
    prompt, logits = world.read(asked)
    planners.observe(pool, asked, prompt, "judge")
    plan = Kvcomm(pool, "judge", read_tail=False).plan(asked)
    assert plan is not None
    moved = divergence(logits, world.follow(planners.repositioned(asked))[1])
    assert divergence(logits, world.follow(plan)[1]) < 0.1 * moved, "its own offset, but for the packing"


@pytest.mark.slow
def test_what_was_prepared_is_what_the_next_plan_asks_for(
    world: Stage, asked: list[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = taught(world)
    planner = Kvcomm(pool, "judge")
    want, anchors = planner.plan(asked), pool.anchor_bytes
    assert pool.nbytes > anchors, "the first plan keeps it, too"
    pool = taught(world)
    planner = Kvcomm(pool, "judge")
    for piece in asked:
        if piece.slot is not None:
            planner.prepare(piece.slot)
    held = pool.nbytes
    planner.prepare("a slot without anchors")
    monkeypatch.setattr(Kriging, "gram", lambda *_: pytest.fail("computed again"))
    got = planner.plan(asked)
    assert pool.nbytes == held > pool.anchor_bytes
    assert want is not None
    assert got is not None
    for a, b in zip(want, got, strict=True):
        assert a.ids == b.ids
        assert isinstance(a, Read) or (isinstance(b, Put) and states_apart(a.state, b.state) < 1e-5)


def test_the_end_is_read_up_to_a_share(asked: list[Piece]) -> None:
    steps = [*planners.repositioned(asked)[:-2], Read(asked[-1].ids)]
    n, tail = len(tokens(asked)), len(asked[-1].ids)
    assert planners.reading_the_end(steps, 0.0) == steps
    for read in (tail + 1, tail + len(asked[-2].ids), tail + len(asked[-2].ids) + 3, n):
        longer = planners.reading_the_end(steps, (read + 0.25) / n)
        assert [i for s in longer for i in s.ids] == tokens(asked)
        *others, last = longer
        assert len(last.ids) == read
        assert all(isinstance(s, Put) and s.ids for s in others)
    known = planners.reading_the_end(steps[1:], (tail + 1.75) / n, known=len(asked[0].ids))
    assert len(known[-1].ids) == tail + 2
    stop = [*steps[:1], Read(asked[1].ids), *steps[2:]]
    assert planners.reading_the_end(stop, 1.0)[1] == stop[1], "two reads are left for `merged`"


def test_kvcomm_reads_the_last_text_or_one_token(asked: list[Piece], pool: Pool) -> None:
    tail = Kvcomm(pool, "judge").plan(asked)
    whole = Kvcomm(pool, "judge", read_tail=False).plan(asked)
    assert tail is not None
    assert whole is not None
    assert [len(s.ids) for s in tail if isinstance(s, Read)] == [len(asked[-1].ids)]
    assert [len(s.ids) for s in whole if isinstance(s, Read)] == [1]
    assert isinstance(whole[-2], Put)
    assert states_apart(whole[-2].state, asked[-1].base[:-1]) > 1e-3, "the text behind a slot is set off too"


def test_an_offset_that_all_anchors_share_is_taken_off(world: Stage, asked: list[Piece]) -> None:
    """Anchors of the same text, many times: what the slot goes through is known, but for the packing of it."""
    pool = Pool(1 << 30)
    prompt, logits = world.read(asked)
    for number in range(5):
        again = [Piece(p.ids, p.base, p.slot, p.text + bytes([number])) for p in asked]
        planners.observe(pool, again, prompt, "judge")
    plan = Kvcomm(pool, "judge", read_tail=False).plan(asked)
    assert plan is not None
    ours = divergence(logits, world.follow(plan)[1])
    moved = divergence(logits, world.follow(planners.repositioned(asked))[1])
    assert ours < 0.1 * moved


@pytest.mark.parametrize("check", [1, 2])
def test_blending_all_tokens_is_the_dense_prompt(world: Stage, asked: list[Piece], check: int) -> None:
    """Invariant 16: a ratio of 1."""
    prompt, logits = world.read(asked)
    blended = world.prompt()
    got = blend(world.network, blended, asked, ratio=1.0, check=check)
    assert apart(got, logits) < 1e-3
    n = len(prompt)
    assert blended.ids == prompt.ids
    assert states_apart(blended.state(0, n), prompt.state(0, n)) < 1e-3


def test_blending_nothing_is_the_moved_prompt_above_the_check(world: Stage, asked: list[Piece]) -> None:
    """Invariant 16: a ratio of 0, and a fresh text behind the last slot. Layers up to the check are all fresh."""
    blended, moved = world.prompt(), world.prompt()
    blend(world.network, blended, asked, ratio=0.0, check=1)
    planners.run(moved, planners.repositioned(asked))
    dense, _ = world.read(asked)
    n, tail = len(dense), len(asked[-1].ids)
    for layer in range(4):
        like = dense if layer <= 1 else moved
        assert apart(blended.state(0, n - tail).values[layer], like.state(0, n - tail).values[layer]) < 1e-3
    assert blended.read_tokens == tail
    assert apart(blended.state(n - tail, n).values[3], moved.state(n - tail, n).values[3]) > 1e-3


@pytest.mark.parametrize(("changed", "seen_by"), [(0, (0, 1)), (2, (1,)), (3, (1,)), (5, ())])
def test_tokens_that_are_read_anew_see_no_later_ones(changed: int, seen_by: tuple[int, ...]) -> None:
    """Invariant 17, on tokens 1 and 4 of six: rows of a pass do not lie side by side."""

    def drawn(*shape: int, seed: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.key(seed))

    def attended(keys: mx.array) -> mx.array:
        rows = Rows(keys, drawn(2, 6, 32, seed=1), np.array([1, 4]))
        fresh = drawn(2, 2, 1, 32, seed=2), drawn(2, 2, 1, 32, seed=3)
        return rows.attend(drawn(2, 4, 1, 32, seed=4), *fresh, scale=0.2, mask=None, sinks=None)

    keys = drawn(2, 6, 32, seed=0)
    before, after = attended(keys), attended(keys.at[:, changed].add(1.0))
    assert tuple(i for i in range(2) if apart(before[i], after[i]) > 1e-4) == seen_by


def test_the_most_different_tokens_are_chosen_in_order() -> None:
    """Invariant 18."""

    def last(count: int) -> np.ndarray:
        return np.arange(12) >= 12 - count

    held = mx.zeros((2, 12, 4))
    fresh = mx.zeros((2, 12, 4))
    fresh[0, 7] = 3.0
    fresh[1, 2] = 5.0
    fresh[1, 11] = 9.0  # of those that are read in any case
    assert selected(held, fresh, 0.2, last(2)).tolist() == [2, 7, 10, 11]
    assert selected(held, fresh, 0.1, last(2)).tolist() == [2, 10, 11]
    assert selected(held, fresh, 0.0, last(1)).tolist() == [11]
    assert selected(held, fresh, 1.0, last(3)).tolist() == list(range(12))
    scattered = np.isin(np.arange(12), (0, 7))
    assert selected(held, fresh, 0.2, scattered).tolist() == [0, 2, 7, 11], (
        "of ten others, the two that differ most"
    )


def test_reused_state_that_is_right_stays_right(world: Stage, asked: list[Piece]) -> None:
    """Invariant 19: whatever is chosen, nothing changes."""
    prompt, logits = world.read(asked)
    at, own = 0, []
    for piece in asked:
        own.append(Piece(piece.ids, prompt.state(at, at + len(piece.ids)), piece.slot, piece.text))
        at += len(piece.ids)
    for ratio in (0.0, 0.3):
        assert apart(blend(world.network, world.prompt(), own, ratio=ratio), logits) < 1e-3


@pytest.mark.slow
def test_reading_more_is_closer_on_average(world: Stage) -> None:
    """Invariant 20."""
    lost = dict.fromkeys((0.05, 0.3, 1.0), 0.0)
    for question, answer in TEXTS:
        pieces = world.pieces(question, answer)
        logits = world.read(pieces)[1]
        for ratio in lost:
            lost[ratio] += divergence(logits, blend(world.network, world.prompt(), pieces, ratio=ratio))
    assert lost[0.05] > lost[0.3] > lost[1.0]
    assert lost[1.0] < 1e-4


def test_a_model_whose_layers_are_not_plain_is_not_blended(world: Stage, asked: list[Piece]) -> None:
    model = random_model("gemma", seed=0).model  # it scales what its embedding gives
    seam.install(model)
    network = Network(model)
    assert network.splits
    assert not network.walks
    with pytest.raises(ModelUnavailable, match="blended"):
        blend(network, world.prompt(), asked)
