"""What state is in the canonical frame: laws that hold for every text, on tiny models of two architectures."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import pytest

from agentmem.compose import planners
from agentmem.compose.offsets import Interpolation, Observed, Paper
from agentmem.compose.packed import PackedState
from agentmem.compose.planners import Piece, Put, Read
from agentmem.compose.prompt import Line
from agentmem.compose.rotation import rotations
from agentmem.compose.state import State, joined
from agentmem.errors import BadRequest
from tests.compose.prompts import Stage, apart, divergence, stage, states_apart

QUESTION, ANSWER = "How much oil is left in the tank after the storm?", "Nine barrels, less one that leaked."


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> Stage:
    return stage(request.param)


@pytest.fixture(scope="module")
def pieces(world: Stage) -> list[Piece]:
    return world.pieces(QUESTION, ANSWER)


def spans(pieces: list[Piece]) -> list[tuple[int, int]]:
    out, at = [], 0
    for piece in pieces:
        out.append((at, at + len(piece.ids)))
        at = out[-1][1]
    return out


def test_layer_0_knows_no_context(world: Stage, pieces: list[Piece]) -> None:
    """Invariant 6. In layers above, context shows."""
    prompt, _ = world.read(pieces)
    start, stop = spans(pieces)[1]
    there, alone = prompt.state(start, stop), pieces[1].base
    assert apart(there.keys[0], alone.keys[0]) < 1e-5
    assert apart(there.values[0], alone.values[0]) < 1e-6
    assert apart(there.values[1], alone.values[1]) > 1e-2


def test_text_in_front_of_the_first_slot_is_exact(world: Stage, pieces: list[Piece]) -> None:
    """Invariant 7."""
    prompt, logits = world.read(pieces)
    assert states_apart(prompt.state(0, len(pieces[0].ids)), pieces[0].base) < 1e-4
    again, got = world.follow(planners.exact(pieces))
    assert apart(got, logits) < 1e-3
    assert again.read_tokens == len(prompt) - len(pieces[0].ids)


def test_the_same_context_leaves_no_offset(world: Stage, pieces: list[Piece]) -> None:
    """Invariant 8: a base that was read behind the very text that stands before the slot."""
    prompt, logits = world.read(pieces)
    own = [
        Piece(p.ids, prompt.state(*span), p.slot, p.text)
        for p, span in zip(pieces, spans(pieces), strict=True)
    ]
    got_prompt, got = world.follow(planners.repositioned(own))
    assert divergence(logits, got) < 1e-6
    assert apart(got, logits) < 1e-3
    assert got_prompt.read_tokens == 1
    n = len(prompt)
    assert states_apart(got_prompt.state(0, n), prompt.state(0, n)) < 1e-3


class Same:
    """The only anchor's offset."""

    aligned = False

    def __call__(self, base: State, anchors: Sequence[Observed]) -> tuple[State, State]:
        return anchors[0].slot, anchors[0].after


@pytest.mark.parametrize("offsets", [Paper(), Same()])
def test_an_anchor_of_itself_gives_the_dense_prompt(
    world: Stage, pieces: list[Piece], offsets: Interpolation
) -> None:
    """Invariant 9, with two slots of other lengths than the template's names for them."""
    prompt, logits = world.read(pieces)
    where = spans(pieces)
    steps: planners.Steps = [Put(pieces[0].ids, pieces[0].base)]
    for i in (1, 3):
        offset, after = (prompt.state(*where[j]) - pieces[j].base for j in (i, i + 1))
        slot, behind = offsets(pieces[i].base, [Observed(pieces[i].base, offset, after)])
        steps += [
            Put(pieces[i].ids, pieces[i].base + slot),
            Put(pieces[i + 1].ids, pieces[i + 1].base + behind),
        ]
    last = steps.pop()
    assert isinstance(last, Put)
    steps += [Put(last.ids[:-1], last.state[:-1]), Read(last.ids[-1:])]
    got_prompt, got = world.follow(steps)
    n = len(prompt)
    assert states_apart(got_prompt.state(0, n), prompt.state(0, n)) < 1e-3
    assert divergence(logits, got) < 1e-6
    moved = world.follow(planners.repositioned(pieces))[1]
    assert divergence(logits, moved) > 1e-4, "nothing to mend: the test would hold without offsets"


class Far(Line):
    """A layer of a prompt whose first token stands at 57, with nothing in front of it."""

    @property
    def offset(self) -> int:
        return 57 + super().offset


def test_state_does_not_depend_on_where_it_stood(world: Stage) -> None:
    """Invariant 10: the same left context at another position. Keys that stay rotated do depend on it."""
    ids = world.ids(QUESTION)
    near, far = world.prompt(), [Far() for _ in world.prompt().lines]
    near.read(ids)
    mx.eval(world.network.logits(mx.array([ids]), far, []))
    state = near.state(0, len(ids))
    for layer, (line, rotation) in enumerate(zip(far, rotations(world.model.model), strict=True)):
        assert line.keys is not None
        assert apart(rotation.unrotate(line.keys, 57), state.keys[layer]) < 1e-3
        assert apart(line.values, state.values[layer]) < 1e-3
        assert apart(line.keys, near.lines[layer].keys) > 0.1


def test_slots_of_one_token_and_of_none(world: Stage) -> None:
    for answer in ("x", ""):
        pieces = world.template.pieces({
            "question": world.filling(QUESTION), "answer": world.filling(answer),
        })  # fmt: skip
        prompt, logits = world.read(pieces)
        for plan in (planners.exact, planners.repositioned, planners.lego):
            got_prompt, got = world.follow(plan(pieces))
            assert got_prompt.ids == prompt.ids
            assert got.shape == logits.shape
            assert mx.isfinite(got).all().item()


def test_packed_states(world: Stage, pieces: list[Piece], monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 22: bounded errors, and nothing stays nothing."""
    state = joined([p.base for p in pieces])
    for bits, bound in ((2, 0.36), (4, 0.16), (8, 0.012)):
        packed = PackedState.of(state, bits)
        back = packed.unpacked()
        assert len(packed) == len(state)
        assert (mx.linalg.norm(back.rows - state.rows) / mx.linalg.norm(state.rows)).item() < bound
        monkeypatch.setattr("agentmem.compose.packed.backend", lambda: "cuda")
        assert states_apart(packed.unpacked(), back) < 1e-6, "MLX's way to unpack, and that of a CPU"
        monkeypatch.undo()
        assert packed.nbytes <= (bits + 0.6) / 32 * state.nbytes
    for bits in (2, 4):
        nothing = PackedState.of(state - state, bits).unpacked()
        assert not nothing.rows.any().item()
    assert len(PackedState.of(state[:0], 2).unpacked()) == 0


@pytest.mark.parametrize("text", ["{{a}}behind", "before{{a}} {{b}}behind", "before{{a}}"])
def test_slots_without_text_around_them_are_refused(world: Stage, text: str) -> None:
    with pytest.raises(BadRequest, match="text in front of"):
        type(world.template).read(text, world.model.tokenizer, world.prompt())
