"""The bench of long lives, on a tiny model: what it says does not depend on how fast the machine is."""

from __future__ import annotations

import pytest

from agentmem.bench.lived import measure
from agentmem.model.random import random_model


@pytest.mark.slow(minutes=0.3)
def test_long_lives_are_measured_to_the_end() -> None:
    result = measure(random_model("llama", seed=0), "q4", 320, 256, [4, 8], 1, lambda text: None)
    near, far = result["rows"]
    assert far["tokens"] > 1.5 * near["tokens"] > 1.5 * 4 * 320
    assert far["evicted_tokens"] > near["evicted_tokens"] > 2 * 320
    for row in (near, far):
        assert row["resident_tokens"] <= row["peak_rows"] < 320 + 8 * 256 < row["tokens"] + 1000
        assert len(row["ttfts_ms"]) == 3
        assert all(ms > 0 for ms in row["ttfts_ms"])
    named = {c["name"]: c for c in result["checks"]}
    assert named["tokens restored by turns of the same episode"]["holds"]
    assert named["rows in RAM at most / (budget + block + a tail of two)"]["holds"]
    assert len(named) == 3  # histories that are this near to each other have no ratio of first tokens
