"""The bench of layouts: what it says of a model type is what it saw."""

from __future__ import annotations

import pytest

from agentmem.bench.layouts import FEATURES, measure, table


@pytest.mark.slow(minutes=0.2)
def test_what_works_is_told_by_trying() -> None:
    result = measure(["llama", "gemma3_text", "mamba2", "deepseek_v2", "gemma4_text"])
    rows = result["rows"]
    assert all(rows["llama"][feature] for feature in FEATURES)
    for name in ("gemma3_text", "mamba2", "deepseek_v2"):
        assert [rows[name][feature] for feature in FEATURES] == [True, True, True, False, False]
    assert rows["gemma3_text"]["kinds"] == {"full": 2, "window": 2}
    assert "keys of other layers" in rows["gemma4_text"]["refused"]
    assert (result["served"], result["refused"]) == (4, 1)
    assert result["checks"][0]["holds"]
    assert "| recurrent | yes | yes | yes | no | no | `mamba2` |" in table(result)
