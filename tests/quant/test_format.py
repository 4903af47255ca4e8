"""Formats: names, groups that fit a model's head dims, and what goes into the fingerprint."""

from __future__ import annotations

import pytest

from agentmem.quant.format import FORMATS, Code, LayerShape, kv_format


def test_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown kv_format 'q5'.*fp16.*q4, q4-plain"):
        kv_format("q5")


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "group"), [(64, 64, 64), (128, 128, 64), (32, 32, 32), (96, 64, 32)]
)
def test_group_is_64_where_it_divides_the_head_dims_and_32_else(
    key_dim: int, value_dim: int, group: int
) -> None:
    fitted = kv_format("q4-plain").for_shape(LayerShape(2, key_dim, value_dim))
    assert fitted.keys == Code(4, group)
    assert fitted.values == Code(4, group)


def test_fitting_keeps_everything_but_the_group() -> None:
    fitted = kv_format("q4-rotated").for_shape(LayerShape(2, 32, 32))
    assert (fitted.name, fitted.rotation, fitted.raw_first_page) == ("q4-rotated", "hadamard", True)
    calibrated = kv_format("q4").for_shape(LayerShape(2, 32, 32))
    assert (calibrated.name, calibrated.calibrated, calibrated.keys) == ("q4", True, Code(4, 32))
    k8 = kv_format("k8v4-plain").for_shape(LayerShape(2, 32, 32))
    assert k8.keys == Code(8, 32)
    assert k8.values == Code(4, 32)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(80, 80), (63, 64), (64, 48), (1, 1)])
def test_head_dims_without_a_group_are_refused_with_a_way_out(key_dim: int, value_dim: int) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 32; this model has {key_dim}/{value_dim}.*fp16"):
        kv_format("q4-plain").for_shape(LayerShape(2, key_dim, value_dim))


def test_fp16_takes_any_head_dim() -> None:
    format = kv_format("fp16")
    assert not format.packs
    assert format.for_shape(LayerShape(2, 80, 6)) is format


def test_identities_of_formats_differ() -> None:
    identities = [str(f.identity()) for f in FORMATS.values()]
    assert len(set(identities)) == len(FORMATS)
    assert all(name == f.name for name, f in FORMATS.items())
    narrow = kv_format("q4-plain").for_shape(LayerShape(2, 32, 32))
    assert narrow.identity() != kv_format("q4-plain").identity()
