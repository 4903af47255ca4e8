"""Packed layers that take the sequences of a batch together."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from agentmem.model import products
from agentmem.model.products import JoinedLinear, join_rows


class Two(nn.Module):
    """A packed layer and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.QuantizedLinear(128, 64, bias=True, group_size=64, bits=4)
        self.plain = nn.Linear(64, 32)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Two:
    monkeypatch.setattr(products, "backend", lambda: "cuda")
    model = Two()
    join_rows(model)
    join_rows(model)
    return model


def test_only_packed_layers_of_a_gpu_are_joined(two: Two) -> None:
    assert type(two.packed) is JoinedLinear
    assert type(two.plain) is nn.Linear


def test_elsewhere_mlx_joins_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "backend", lambda: "metal")
    model = Two()
    join_rows(model)
    assert type(model.packed) is nn.QuantizedLinear


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9])
def test_each_sequence_gets_its_own_product(two: Two, rows: int) -> None:
    x = mx.random.normal((rows, 1, 128), key=mx.random.key(rows))
    out = two.packed(x)
    assert out.shape == (rows, 1, 64)
    for i in range(rows):
        assert mx.allclose(out[i], two.packed(x[i]), atol=1e-5).item()


def test_prompts_go_the_usual_way(two: Two) -> None:
    x = mx.random.normal((3, 5, 128), key=mx.random.key(0))
    usual = nn.QuantizedLinear.__call__(two.packed, x)
    assert mx.array_equal(two.packed(x), usual).item()
    assert mx.array_equal(two.packed(x[0]), usual[0]).item()
