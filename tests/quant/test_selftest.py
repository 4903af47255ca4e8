"""The start-up self-test lets right paths through and refuses wrong ones."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from agentmem.quant import rows, selftest
from agentmem.quant.attention import dequantised_history, reference_attention, reference_path
from agentmem.quant.device import backend
from agentmem.quant.format import FORMATS, LayerShape, kv_format
from agentmem.quant.paths import PATHS

SHAPE = LayerShape(2, 64, 64)


def check(name: str = "q4-plain", dtype: mx.Dtype = mx.float32) -> dict[str, Any]:
    stored = mx.bfloat16 if dtype == mx.bfloat16 else mx.float16
    return selftest.self_test(kv_format(name), SHAPE, 4, dtype, stored)


def forgets_the_first_row(q: mx.array, k: mx.array, v: mx.array, history: Any, **options: Any) -> mx.array:
    keys, values = history
    return reference_attention(
        q, k, v, ([keys[0][:, 1:], *keys[1:]], [values[0][:, 1:], *values[1:]]), **options
    )


def wrong_scale(
    q: mx.array, k: mx.array, v: mx.array, history: Any, *, scale: float, **options: Any
) -> mx.array:
    return reference_attention(q, k, v, history, scale=scale * 1.01, **options)


def sees_the_future(
    q: mx.array, k: mx.array, v: mx.array, history: Any, *, scale: float, **_: Any
) -> mx.array:
    keys, values = (
        mx.concatenate([*(x[None] for x in old), new], axis=2)
        for old, new in zip(history, (k, v), strict=True)
    )
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale)


def as_path(attend: Any) -> Any:
    """A path that attends with `attend` over dequantised rows."""

    def path(codec: Any, stored: Any, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> Any:
        history = dequantised_history(codec, stored.raw_blocks(), stored.packed_rows(), k.dtype)
        return attend(q, k, v, history, **options), codec.raw(k[0], v[0])

    return path


def stores_other_rows(codec: Any, stored: Any, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> Any:
    out, new_rows = reference_path(codec, stored, q, k, v, **options)
    return out, new_rows + 1


def does_not_run(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no such kernel")


WRONG = [
    *(as_path(f) for f in (forgets_the_first_row, wrong_scale, sees_the_future)),
    stores_other_rows,
    does_not_run,
]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_reference_path_passes(name: str) -> None:
    result = check(name)
    assert result["paths"]["reference"]["ok"]
    assert result["paths"]["reference"]["error"] < 1e-4
    assert result["code_error"] <= 1.5


@pytest.mark.skipif(backend() != "cpu", reason="GPUs have kernels of their own")
@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"fp16"}))
def test_direct_path_passes_on_a_cpu(name: str) -> None:
    assert check(name)["paths"]["direct"]["ok"]
    assert check(name)["paths"]["direct"]["error"] < 1e-5


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
def test_reference_path_passes_in_16_bits(dtype: mx.Dtype) -> None:
    assert check(dtype=dtype)["paths"]["reference"]["ok"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_path_is_refused_and_named(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(PATHS, "wrong", wrong)
    result = check()
    assert not result["paths"]["wrong"]["ok"]
    assert result["paths"]["reference"]["ok"]
    assert "wrong refused" in caplog.text


def test_without_a_right_path_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(PATHS):
        monkeypatch.delitem(PATHS, name)
    monkeypatch.setitem(PATHS, "wrong", as_path(wrong_scale))
    with pytest.raises(RuntimeError, match="no attention path"):
        check()


def test_broken_packing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = rows._pack

    def off_by_one_code(x: mx.array, code: Any) -> mx.array:
        words = pack(x, code)
        return mx.concatenate([words[:, :1] ^ 0x77777777, words[:, 1:]], axis=1)

    monkeypatch.setattr(rows, "_pack", off_by_one_code)
    with pytest.raises(RuntimeError, match="packing is broken"):
        check()
