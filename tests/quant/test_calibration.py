"""Calibration: what is measured of keys and queries, and that only its own values are read back."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from agentmem.quant.calibration import Calibration, Correction, corrected, spare_layers, wide_format
from agentmem.quant.format import Code, LayerShape, kv_format
from agentmem.quant.rows import RowCodec

SHAPE = LayerShape(2, 64, 64)
CODE = Code(4, 64)


def measured(keys: mx.array, queries: mx.array, code: Code = CODE) -> Correction:
    return corrected(keys, queries, scale=0.125, code=code, stored=mx.float16)


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def spread(seed: int) -> np.ndarray:
    """Powers of four, one a channel."""
    return np.exp2(2 * np.random.default_rng(seed).integers(-2, 3, (2, 64))).astype(np.float32)


def some(**changes: float) -> Calibration:
    one = measured(normal(1, 2, 100, 64) + 3, normal(2, 4, 100, 64))
    return Calibration((one, dataclasses.replace(one, **changes)))


def test_means_and_scales_are_those_of_each_head_and_channel() -> None:
    mean, size = np.random.default_rng(3).normal(0, 9, (2, 64)), spread(1)
    keys = mx.array(mean[:, None].astype(np.float32)) + normal(1, 2, 4000, 64) * mx.array(size[:, None])
    found = measured(keys, normal(2, 6, 500, 64) / mx.array(np.repeat(size, 3, axis=0)[:, None]))
    assert np.array_equal(found.scale, size)
    assert (np.abs(found.mean - mean) <= 0.25 * size).all()
    assert not found.wide


@pytest.mark.parametrize("seed", range(3))
def test_the_last_bits_of_a_machine_do_not_show(seed: int) -> None:
    keys, queries = normal(seed, 2, 400, 64) * mx.array(spread(seed)[:, None]), normal(9, 4, 400, 64)
    found = measured(keys, queries)
    other = measured(keys * (1 + 1e-7 * normal(5, *keys.shape)), queries * (1 + 1e-7))
    assert Calibration((found,)).digest == Calibration((other,)).digest


def test_channels_that_never_change_and_queries_of_nothing_give_sound_values() -> None:
    keys = mx.concatenate([mx.full((2, 50, 32), 7.0), mx.zeros((2, 50, 32))], axis=2)
    for queries in (normal(1, 2, 50, 64), mx.zeros((2, 50, 64))):
        found = measured(keys, queries)
        assert found.fits(SHAPE)
        assert np.abs(found.mean[:, :32] - 7).max() < 0.1


def test_keys_that_lose_too_much_stay_wide() -> None:
    """Outliers of a few keys in all directions are what no static correction takes off."""
    keys, queries = normal(1, 2, 300, 64), normal(2, 4, 300, 64) * 4
    assert not measured(keys, queries).wide
    spikes = mx.where(mx.random.uniform(shape=keys.shape, key=mx.random.key(3)) < 0.02, 60.0, 1.0)
    assert measured(keys * spikes, queries).wide
    assert not measured(keys * spikes, queries, Code(8, 64)).wide


def test_wide_layers_keep_eight_bits_for_keys_and_nothing_else_changes() -> None:
    q4 = kv_format("q4").for_shape(LayerShape(2, 96, 96))
    wide = wide_format(q4)
    assert wide.keys == Code(8, 32)
    assert dataclasses.replace(wide, keys=q4.keys) == q4
    assert wide.identity() != q4.identity()


def test_a_digest_is_that_of_the_values() -> None:
    one = some()
    assert one.digest == some().digest
    assert one.digest != some(noise=2.0).digest
    assert one.digest != Calibration(one.layers[:1]).digest
    for field in ("mean", "scale"):
        values = getattr(one.layers[1], field).copy()
        values[1, 63] *= 2
        changed = dataclasses.replace(one.layers[1], **{field: values})
        assert Calibration((one.layers[0], changed)).digest != one.digest


def test_tensors_come_back_as_they_were() -> None:
    one = some(noise=2.0)
    again = Calibration.from_tensors(one.tensors(), [SHAPE, SHAPE])
    assert again.digest == one.digest
    assert [layer.wide for layer in again.layers] == [False, True]


def test_values_that_were_touched_or_belong_elsewhere_are_refused() -> None:
    sound = some().tensors()

    def refused(change: dict[str, np.ndarray], why: str, *shapes: LayerShape) -> None:
        with pytest.raises(ValueError, match=why):
            Calibration.from_tensors(sound | change, shapes or [SHAPE, SHAPE])

    refused({"mean.1": sound["mean.1"] + 1}, "checksum")
    refused({"noise.0": np.array([9.0], np.float32)}, "checksum")  # such a layer would be wide
    refused({"noise.0": np.array([np.nan], np.float32)}, "not those of this model")
    refused({}, "'mean.2' is missing", SHAPE, SHAPE, SHAPE)
    refused({}, "not those of this model", SHAPE, LayerShape(1, 64, 64))
    for bad in (np.nan, 0.0, -1.0, 3.0, 2.0**40):
        refused({"scale.0": np.full((2, 64), bad, np.float32)}, "not those of this model")
    refused({"mean.0": np.full((2, 64), np.inf, np.float32)}, "not those of this model")
    refused({"mean.0": sound["mean.0"].astype(np.float64)}, "not those of this model")


def test_spare_bits_go_to_the_layers_with_most_noise() -> None:
    """As many as the format allows on average, and not one more."""
    shape = LayerShape(2, 64, 64)
    codecs = [RowCodec(shape, kv_format("q4").for_shape(shape), mx.float16)] * 30
    noises = [0.1 + 0.01 * (7 * i % 30) for i in range(30)]
    chosen = spare_layers(codecs, noises)
    assert {noises[i] for i in chosen} == set(sorted(noises)[-12:])
    wide = [
        dataclasses.replace(c, format=wide_format(c.format, c.format.spare_bits)) if i in chosen else c
        for i, c in enumerate(codecs)
    ]
    bits = sum(32 * c.packed_words for c in wide) / (30 * 256)
    assert bits == 4.7
    assert spare_layers(codecs[:2], noises[:2]) == []
    plain = [RowCodec(shape, kv_format("q4-plain").for_shape(shape), mx.float16)] * 30
    assert spare_layers(plain, noises) == []
    three = [RowCodec(shape, kv_format("q3").for_shape(shape), mx.float16)] * 30
    assert len(spare_layers(three, noises)) == 18
