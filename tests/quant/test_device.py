"""Arrays of the host on a device with memory of its own."""

from __future__ import annotations

import numpy as np
import pytest

from agentmem.quant import device
from agentmem.quant.device import on_device


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.uint32, np.float32, np.float16])
def test_an_array_on_the_device_is_the_same_array(
    monkeypatch: pytest.MonkeyPatch, dtype: type[np.generic], unified: bool
) -> None:
    """A mask of bools that became numbers would be added to the scores."""
    monkeypatch.setattr(device, "unified_memory", lambda: unified)
    values = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    made = np.array(on_device(values))
    assert made.dtype == values.dtype
    assert np.array_equal(made, values)
