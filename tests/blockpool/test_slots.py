"""Slots: references are counted right whatever the order of operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from agentmem.blockpool.slots import Slots
from agentmem.errors import Overloaded

COUNT = 12


class SlotsMachine(RuleBasedStateMachine):
    """Holders take, share and release; a plain dict of counts is the truth."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(COUNT)
        self.counts = dict.fromkeys(range(COUNT), 0)

    def free(self) -> list[int]:
        return [s for s, n in self.counts.items() if n == 0]

    def has_run(self, n: int) -> bool:
        free = set(self.free())
        return any(all(s + i in free for i in range(n)) for s in range(COUNT))

    @rule(target=held, n=st.integers(0, COUNT + 1))
    def take(self, n: int) -> object:
        free = self.free()
        if n > len(free):
            with pytest.raises(Overloaded, match=f"{n} KV slots needed, {len(free)} of {COUNT} free"):
                self.slots.take(n)
            return multiple()
        contiguous = self.has_run(n)
        taken = self.slots.take(n)
        assert len(set(taken)) == n
        assert all(self.counts[s] == 0 for s in taken), "a slot in use was handed out"
        if contiguous and n:
            assert taken == list(range(taken[0], taken[0] + n)), "a contiguous run was free"
        for s in taken:
            self.counts[s] = 1
        return tuple(taken)

    @rule(target=held, slots=held)
    def share(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        self.slots.share(slots)
        for s in slots:
            self.counts[s] += 1
        return slots

    @rule(slots=consumes(held))
    def release(self, slots: tuple[int, ...]) -> None:
        self.slots.release(slots)
        for s in slots:
            self.counts[s] -= 1

    @invariant()
    def counts_agree(self) -> None:
        self.slots.check()
        assert self.slots.free == len(self.free())


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_slot_is_not_freed_twice() -> None:
    slots = Slots(3)
    taken = tuple(slots.take(2))
    slots.release(taken)
    with pytest.raises(AssertionError, match="free already"):
        slots.release(taken)


def test_a_free_slot_cannot_be_shared() -> None:
    slots = Slots(3)
    with pytest.raises(AssertionError, match="is free"):
        slots.share((1,))


def test_failed_take_changes_nothing() -> None:
    slots = Slots(4)
    slots.take(3)
    with pytest.raises(Overloaded):
        slots.take(2)
    assert slots.free == 1
    assert slots.take(1) == [3]


def test_scattered_slots_are_taken_when_no_run_is_free() -> None:
    slots = Slots(6)
    slots.take(6)
    slots.release((0, 2, 4))
    assert sorted(slots.take(2)) in ([0, 2], [2, 4], [0, 4])
    assert slots.free == 1
