"""RoPE algebra, for every kind of RoPE in mlx-lm, against mlx-lm's own modules and models."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from agentmem.compose.rotation import Rotation, rotated, rotation, rotations
from agentmem.errors import ModelUnavailable
from agentmem.model import seam
from agentmem.model.random import random_model

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.3}
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": 1.0, "long_factor": 2.5,
}  # fmt: skip
KINDS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "longrope": LONG,
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "mrope": {"rope_type": "mrope", "mrope_section": [8, 12, 12]},
}
ROPES = [
    (kind, dim, dims, traditional)
    for kind in KINDS
    for dim, dims in ((64, 64), (128, 64), (128, 128), (256, 256))
    for traditional in ((False,) if kind == "longrope" else (False, True))
]
every_rope = pytest.mark.parametrize(("kind", "dim", "dims", "traditional"), ROPES)


def rope_of(kind: str, dims: int, traditional: bool) -> Any:
    return initialize_rope(dims, 10000.0, traditional, KINDS[kind], max_position_embeddings=4096)


def keys(dim: int, n: int = 9, seed: int = 0) -> mx.array:
    return mx.random.normal((3, n, dim), key=mx.random.key(seed))


def apart(a: mx.array, b: mx.array) -> float:
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


@every_rope
def test_the_models_rotation_is_undone_and_done_again(
    kind: str, dim: int, dims: int, traditional: bool
) -> None:
    """Invariants 1 to 5 of composed reuse, at positions up to 32,000."""
    rope, x = rope_of(kind, dims, traditional), keys(dim)
    own = rotation(rope)
    plain = rope(
        mx.stack([x[:, i] for i in range(x.shape[1])])[:, :, None], offset=0
    )  # with the factor of some kinds
    plain = plain[:, :, 0].swapaxes(0, 1)
    for start in (0, 1, 700, 32000):
        placed = rope(x[None], offset=start)[0]
        assert apart(own.rotate(plain, start), placed) < 1e-5
        assert apart(own.unrotate(placed, start), plain) < 1e-5
        for shift in (-start // 2, 35, 3000):
            moved = own.rotate(own.unrotate(placed, start), start + shift)
            assert apart(moved, rope(x[None], offset=start + shift)[0]) < 1e-5
        again = own.rotate(own.unrotate(placed, start), start)
        assert apart(again, placed) < 1e-5
        assert mx.array_equal(placed[..., dims:], own.unrotate(placed, start)[..., dims:])
        length = mx.linalg.norm(placed, axis=-1)
        assert apart(mx.linalg.norm(own.unrotate(placed, start), axis=-1), length) < 1e-4


@every_rope
def test_scores_depend_on_distance_alone(kind: str, dim: int, dims: int, traditional: bool) -> None:
    own, query, key = rotation(rope_of(kind, dims, traditional)), keys(dim, 1), keys(dim, 1, seed=1)

    def score(q: int, k: int) -> mx.array:
        return (own.rotate(query, q) * own.rotate(key, k)).sum(axis=-1)

    assert apart(score(40, 3), score(540, 503)) < 1e-3
    assert apart(score(40, 3), score(41, 3)) > 1e-3


@every_rope
def test_tokens_may_lie_anywhere(kind: str, dim: int, dims: int, traditional: bool) -> None:
    own, x = rotation(rope_of(kind, dims, traditional)), keys(dim, 4)
    at = [5, 0, 1700, 6]
    together = own.rotate(x, mx.array(at))
    for i, position in enumerate(at):
        assert apart(together[:, i : i + 1], own.rotate(x[:, i : i + 1], position)) < 1e-5
    assert apart(own.unrotate(together, mx.array(at)), x) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 2e-3), (mx.bfloat16, 1e-2)])
def test_half_precision_keys_come_back(dtype: mx.Dtype, tolerance: float) -> None:
    own, x = rotation(nn.RoPE(64, base=10000.0)), keys(64).astype(dtype)
    placed = own.rotate(x, 30000).astype(dtype)
    back = own.unrotate(placed, 30000)
    assert (mx.linalg.norm(back - x) / mx.linalg.norm(x)).item() < tolerance


def test_a_layer_without_positions_leaves_keys_alone() -> None:
    assert mx.array_equal(Rotation(0).rotate(keys(64), 77), keys(64))


def test_angles_that_depend_on_the_prompts_length_are_refused() -> None:
    rope = initialize_rope(
        64, 10000.0, False, {"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=64
    )
    with pytest.raises(ModelUnavailable, match="length"):
        rotation(rope)


def test_positions_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ModelUnavailable, match="OtherRotary"):
        rotation(type("OtherRotary", (nn.Module,), {})())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}), ("qwen3", {}), ("llama", {"rope_scaling": LLAMA3}), ("llama", {"rope_scaling": YARN}),
        ("llama", {"rope_traditional": True}), ("smollm3", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}),
    ],
)  # fmt: skip
def test_rotations_of_whole_models(architecture: str, options: dict[str, Any]) -> None:
    model = random_model(architecture, seed=1, **options).model
    seam.install(model)
    found = rotations(model)
    assert len(found) == 2
    if architecture == "smollm3":
        assert sorted(r.dims for r in found) == [0, 64]


def test_a_model_that_places_its_keys_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama", seed=1).model
    seam.install(model)
    rope = model.layers[1].self_attn.rope
    monkeypatch.setattr(type(rope), "__call__", lambda self, x, offset=0: mx.fast.rope(
        x, self.dims, traditional=False, base=self.base, scale=1.0, offset=2 * offset))  # fmt: skip
    with pytest.raises(ModelUnavailable, match="unknown way"):
        rotations(model)


def test_layers_that_turn_alike_turn_as_each_would_alone() -> None:
    shared = 1.0 / mx.arange(1, 33).astype(mx.float32)
    plain = Rotation(64, base=10000.0)
    own = [
        plain, Rotation(64, base=500.0), plain, Rotation(64, freqs=shared), Rotation(64, freqs=2 * shared),
        Rotation(0), Rotation(64, freqs=shared), Rotation(64, base=10000.0), plain,
    ]  # fmt: skip
    heads = [2, 2, 2, 2, 2, 2, 2, 2, 3]
    keys = [mx.random.normal((h, 5, 64), key=mx.random.key(n)) for n, h in enumerate(heads)]
    for alone, k, got in zip(own, keys, rotated(own, keys, 77), strict=True):
        assert mx.array_equal(got, alone.rotate(k, 77))


def test_equal_frequencies_are_one_array_and_turn_together() -> None:
    model = random_model("llama", seed=0, rope_scaling=LLAMA3 | {"rope_theta": 10000.0})
    seam.install(model.model)
    first, second = rotations(model.model)
    assert first.freqs is not None
    assert first.freqs is second.freqs
