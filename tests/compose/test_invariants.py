"""Laws of composed reuse on models that are not plain: layers with two kinds of RoPE, and latents; and in parts of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask

from agentmem.compose import planners
from agentmem.compose.blend import Rows, blend
from agentmem.compose.planners import Piece
from agentmem.compose.rotation import Rotation, rotation, rotations
from agentmem.errors import ModelUnavailable
from agentmem.model import seam
from agentmem.model.network import Network
from agentmem.model.random import random_model
from tests.compose.prompts import PATTERN, WINDOW, Stage, apart, stage, states_apart, windowed_model

pytestmark = pytest.mark.slow

FAR = 57
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.3}
TURNING = 32
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 48, "qk_rope_head_dim": TURNING,
    "qk_nope_head_dim": 40, "v_head_dim": 24, "rope_scaling": YARN,
}  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 256, 40)]
TAIL = [int(i) for i in np.random.default_rng(6).integers(0, 256, 7)]


class Placed:
    """A layer's cache whose first token stands at `first`, with nothing in front of it; masks are the model's own."""

    def __init__(self, first: int = 0, keys: mx.array | None = None, values: mx.array | None = None) -> None:
        self.first, self.keys, self.values = first, keys, values

    @property
    def held(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[2])

    @property
    def offset(self) -> int:
        return self.first + self.held

    def make_mask(self, n: int, *, window_size: int | None = None, **_: Any) -> mx.array:
        return create_causal_mask(n, self.held, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values
        return keys, values


def read(model: nn.Module, ids: Sequence[int], lines: Sequence[Placed]) -> mx.array:
    """Logits [n, vocab]."""
    return model(mx.array([list(ids)]), cache=lines)[0]


def lines_of(model: nn.Module, first: int) -> list[tuple[mx.array, mx.array]]:
    """What each layer keeps of `IDS` from position `first` on: two arrays [heads, n, dim]."""
    lines = [Placed(first) for _ in model.layers]
    mx.eval(read(model, IDS, lines))
    return [
        (line.keys[0], line.values[0]) for line in lines if line.keys is not None and line.values is not None
    ]


def moved(own: Rotation, keys: mx.array, start: int, to: int) -> mx.array:
    return own.rotate(own.unrotate(keys, start), to)


@pytest.fixture(scope="module")
def windowed() -> nn.Module:
    return windowed_model()


def test_each_layer_turns_by_its_own_rope(windowed: nn.Module) -> None:
    """Invariant 24, on a text longer than the window. The other kind of layer's rotation is far off."""
    ropes = [rotation(layer.self_attn.rope) for layer in windowed.layers]
    bases = [1e4] * (PATTERN - 1) + [1e6, 1e4]
    assert [own.base for own in ropes] == bases
    near, far, back = (lines_of(windowed, first) for first in (0, FAR, 3))
    for number, own in enumerate(ropes):
        other = ropes[0 if number == PATTERN - 1 else PATTERN - 1]
        (keys, values), (far_keys, far_values), (back_keys, _) = near[number], far[number], back[number]
        assert apart(moved(own, keys, 0, FAR), far_keys) < 1e-3
        assert apart(moved(own, far_keys, FAR, 3), back_keys) < 1e-3
        assert apart(values, far_values) < 1e-3
        assert apart(moved(other, keys, 0, FAR), far_keys) >= 0.1
        assert apart(moved(other, far_keys, FAR, 3), back_keys) >= 0.1


def test_rotations_of_a_model_with_two_kinds_of_rope(windowed: nn.Module) -> None:
    seam.install(windowed)
    assert [own.base for own in rotations(windowed)] == [1e4] * (PATTERN - 1) + [1e6, 1e4]


def test_a_model_whose_layers_share_the_wrong_rope_is_refused(
    monkeypatch: pytest.MonkeyPatch, windowed: nn.Module
) -> None:
    seam.install(windowed)
    only = rotation(windowed.layers[0].self_attn.rope)
    monkeypatch.setattr("agentmem.compose.rotation.rotation", lambda rope: only)
    with pytest.raises(ModelUnavailable, match="unknown way"):
        rotations(windowed)


def test_a_window_shows_in_the_layers_above(windowed: nn.Module) -> None:
    """The law of layer 0 (invariant 6) in such a model; and that the window of these tests is one."""
    cut = [Placed() for _ in windowed.layers]
    mx.eval(read(windowed, IDS[8:], cut))
    whole = lines_of(windowed, 0)
    for number, line in enumerate(cut):
        assert line.values is not None
        off = mx.abs(line.values[0] - whole[number][1][:, 8:]).max(axis=(0, 2))
        # What the 8 tokens left out have said reaches WINDOW - 1 tokens further with each layer.
        reached = min(number * (WINDOW - 1), len(off))
        assert (off[reached:] < 1e-4).all().item()
        assert (off[:reached] > 1e-2).any().item() == (number > 0)


class Form:
    """Where a DeepSeek-shaped model keeps what turns: beside the latent, or behind the rest of each head's key."""

    def __init__(self, architecture: str) -> None:
        self.latent = architecture == "deepseek_v3"
        self.model = random_model(architecture, seed=2, num_hidden_layers=3, **LATENT).model

    @property
    def ropes(self) -> list[Rotation]:
        modules = [layer.self_attn.rope for layer in self.model.layers]
        if self.latent:
            return [rotation(m) for m in modules]
        return [Rotation(TURNING, traditional=True, freqs=m._freqs) for m in modules]

    def turning(self, line: tuple[mx.array, mx.array]) -> mx.array:
        return line[1] if self.latent else line[0][..., -TURNING:]

    def still(self, line: tuple[mx.array, mx.array]) -> list[mx.array]:
        """What knows no position: the latent, or the rest of the keys and the values."""
        return [line[0]] if self.latent else [line[0][..., :-TURNING], line[1]]

    def moved(
        self, own: Rotation, line: tuple[mx.array, mx.array], start: int, to: int
    ) -> tuple[mx.array, mx.array]:
        turned = moved(own, self.turning(line), start, to)
        if self.latent:
            return line[0], turned
        return mx.concatenate([line[0][..., :-TURNING], turned], axis=-1), line[1]


@pytest.fixture(scope="module", params=["deepseek_v3", "deepseek_v2"])
def form(request: pytest.FixtureRequest) -> Form:
    return Form(request.param)


def test_of_a_latent_s_key_only_one_part_turns(form: Form) -> None:
    """Invariant 26. The factor of YaRN stays in the key: it is not applied again."""
    near, far = lines_of(form.model, 0), lines_of(form.model, FAR)
    for number, own in enumerate(form.ropes):
        assert own.dims == TURNING
        shifted = form.moved(own, near[number], 0, FAR)
        assert apart(form.turning(shifted), form.turning(far[number])) < 1e-3
        assert apart(form.turning(near[number]), form.turning(far[number])) > 0.1
        for kept, was, there in zip(
            *(form.still(x) for x in (shifted, near[number], far[number])), strict=True
        ):
            assert mx.array_equal(kept, was)
            assert mx.array_equal(was, there) if number == 0 else apart(was, there) < 1e-3
        neighbours = Rotation(own.dims, not own.traditional, freqs=own.freqs)
        assert (
            apart(form.turning(form.moved(neighbours, near[number], 0, FAR)), form.turning(far[number])) > 0.1
        )


@pytest.mark.parametrize("tail", [TAIL, TAIL[:1]])
def test_a_moved_latent_predicts_what_a_dense_one_does(form: Form, tail: list[int]) -> None:
    """Invariants 26 and 9: a text read at `FAR`, put at 0, and what is read behind it. One token takes another way."""
    lines = [Placed() for _ in form.model.layers]
    want = read(form.model, IDS + tail, lines)[len(IDS) :]

    def behind(to: int) -> mx.array:
        put = [
            form.moved(own, x, FAR, to) for own, x in zip(form.ropes, lines_of(form.model, FAR), strict=True)
        ]
        return read(form.model, tail, [Placed(0, keys[None], values[None]) for keys, values in put])

    assert apart(behind(0), want) < 1e-3
    assert apart(behind(FAR), want) > 0.1, "keys that stay where they were would do as well"


def test_a_model_with_latents_is_refused(form: Form) -> None:
    """Its keys do not turn in front, or not at all: better no rotation than a wrong one."""
    seam.install(form.model)
    with pytest.raises(ModelUnavailable, match="unknown way" if form.latent else "are not known"):
        rotations(form.model)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def world(request: pytest.FixtureRequest) -> Stage:
    return stage(request.param, layers=4)


@pytest.fixture(scope="module")
def asked(world: Stage) -> list[Piece]:
    return world.pieces("How many steps lead up to the lamp?", "One hundred and twelve.")


@pytest.mark.parametrize("size", [1, 5])
def test_a_tail_read_in_parts_is_the_tail(world: Stage, asked: list[Piece], size: int) -> None:
    """Invariant 21, behind state that was put."""
    *put, tail = asked
    whole, parts = world.prompt(), world.prompt()
    for prompt in (whole, parts):
        for piece in put:
            prompt.put(piece.ids, piece.base)
    logits = whole.read(tail.ids)
    assert len(tail.ids) > 2 * size
    for at in range(0, len(tail.ids), size):
        got = parts.read(tail.ids[at : at + size])
    assert apart(got, logits) < 1e-3
    assert parts.ids == whole.ids
    assert parts.read_tokens == whole.read_tokens == len(tail.ids)
    assert states_apart(parts.state(0, len(parts)), whole.state(0, len(whole))) < 1e-3
    dense = world.follow(planners.dense(asked))[1]
    assert apart(logits, dense) > 1e-2, "what was put does not matter: the test would hold without it"


class Streamed(Network):
    """Reads the rows of each layer in parts of `size`, from the first to the last or the other way."""

    def __init__(self, model: nn.Module, size: int, *, forward: bool = True) -> None:
        super().__init__(model)
        self.size, self.forward, self.parts = size, forward, 0

    def layer(self, number: int, hidden: mx.array, view: Any, mask: str | None = None) -> mx.array:
        if not isinstance(view, Rows):
            return super().layer(number, hidden, view, mask)
        at, n = np.array(view.offset), len(hidden)
        starts = range(0, n, self.size)
        out = {}
        for start in starts if self.forward else reversed(starts):
            rows = Rows(view.keys, view.values, at[start : start + self.size])
            out[start] = super().layer(number, hidden[start : start + self.size], rows)
            view.keys, view.values = rows.keys, rows.values
        self.parts += len(out)
        return mx.concatenate([out[start] for start in starts])


@pytest.mark.parametrize("ratio", [0.16, 1.0])
@pytest.mark.parametrize("size", [1, 9])
def test_tokens_read_anew_in_parts_are_those_read_at_once(
    world: Stage, asked: list[Piece], size: int, ratio: float
) -> None:
    """Invariant 21: a layer's rows in several passes. The order of the passes does matter."""

    def blended(network: Network) -> tuple[mx.array, mx.array]:
        prompt = world.prompt()
        logits = blend(network, prompt, asked, ratio=ratio)
        return logits, prompt.state(0, len(prompt)).rows

    logits, state = blended(world.network)
    streamed = Streamed(world.model.model, size)
    got_logits, got_state = blended(streamed)
    assert streamed.parts > 8
    assert apart(got_logits, logits) < 1e-3
    assert apart(got_state, state) < 1e-3
    backward = blended(Streamed(world.model.model, size, forward=False))[1]
    assert apart(backward, state) > 1e-2
