"""Time that a part of the engine takes."""

from __future__ import annotations

import time

from agentmem.bench.toll import Toll


class Part:
    def slow(self) -> str:
        time.sleep(0.02)
        return self.quick()

    def quick(self) -> str:
        return "done"


def test_time_inside_is_counted_once_and_only_while_it_is_entered() -> None:
    part = Part()
    with Toll(part) as toll:
        assert part.slow() == "done"
        part.quick()
        time.sleep(0.02)
    part.slow()
    assert toll.calls == 2
    assert 0.02 <= toll.seconds < toll.total - 0.02
    assert 0 < toll.share < 1
