"""One promised figure of a benchmark."""

from __future__ import annotations

from typing import Any


def check(name: str, value: float, bound: float, unit: str, at_most: bool) -> dict[str, Any]:
    """One promised figure and whether it holds."""
    return {
        "name": name,
        "value": value,
        "bound": bound,
        "unit": unit,
        "holds": value <= bound if at_most else value >= bound,
    }
