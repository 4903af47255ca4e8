"""Measured times: what they predict, and that a hiccup does not spoil them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.engine.pace import ALIKE, Pace

FIXED, PER_TOKEN, PER_PAIR = 8.0, 0.05, 2e-5


def cost(parts: list[tuple[int, int]]) -> float:
    """A machine that keeps exactly to the model."""
    return FIXED + sum(PER_TOKEN * n + PER_PAIR * n * (history + n / 2) for n, history in parts)


def measured(*passes: list[tuple[int, int]]) -> Pace:
    pace = Pace()
    for parts in passes:
        pace.prefilled(parts, cost(parts))
    return pace


def test_prefill_time_is_learnt_with_its_growth_behind_history() -> None:
    pace = measured([(512, 0)], [(512, 512)], [(64, 2000), (32, 10)], [(16, 0)], [(512, 4096)])
    for parts in ([(128, 0)], [(128, 16000)], [(16, 1), (300, 8000)]):
        assert pace.prefill_ms(parts) == pytest.approx(cost(parts), rel=1e-3)


def test_a_token_counts_a_millisecond_before_anything_is_measured() -> None:
    assert Pace().prefill_ms([(100, 4000)]) == 100
    assert Pace().decode_ms(3) == 0


@pytest.mark.parametrize("slow", [(512, 0), (16, 0), (512, 8000)])
@pytest.mark.parametrize("after", [1, 2, 10])
def test_a_first_call_that_compiles_is_forgotten_at_the_next_pass(slow: tuple[int, int], after: int) -> None:
    pace = Pace()
    pace.prefilled([slow], 4000.0)
    for i in range(after):
        pace.prefilled([(16 * (i + 1), 0)], cost([(16 * (i + 1), 0)]))
    assert pace.prefill_ms([(64, 0)]) < 4 * cost([(64, 0)])


def test_hiccups_do_not_move_the_rate() -> None:
    passes = [[(16 + 37 * i % 500, 300 * i)] for i in range(4 * ALIKE)]
    pace = measured(*passes)
    for i in (3, 11, 29):
        pace.prefilled(passes[i], 40 * cost(passes[i]))
    assert pace.prefill_ms([(256, 1000)]) == pytest.approx(cost([(256, 1000)]), rel=0.05)


def test_a_machine_that_became_slower_is_noticed() -> None:
    pace = measured(*([(256, 64 * i)] for i in range(4 * ALIKE)))
    for i in range(4 * ALIKE):
        pace.prefilled([(256, 64 * i)], 3 * cost([(256, 64 * i)]))
    assert pace.prefill_ms([(256, 640)]) == pytest.approx(3 * cost([(256, 640)]), rel=0.05)


def test_short_passes_do_not_make_forget_what_a_token_of_a_long_one_adds() -> None:
    """Else they would be taken for dear by the token, and so stay short."""
    pace = measured(*([(2048, 2048 * i)] for i in range(4)))
    for i in range(8 * ALIKE):
        parts = [(32, 8192 + 32 * i)]
        pace.prefilled(parts, (1.1 if i % 3 else 0.9) * cost(parts))
    assert pace.prefill_ms([(512, 10_000)]) == pytest.approx(cost([(512, 10_000)]), rel=0.15)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(1, 2048), st.integers(0, 100_000), st.floats(0.0, 1e5)),
        min_size=1,
        max_size=8 * ALIKE,
    )
)
def test_predictions_never_fall_with_more_work(samples: list[tuple[int, int, float]]) -> None:
    pace = Pace()
    for tokens, history, ms in samples:
        pace.prefilled([(tokens, history)], ms)
    small = pace.prefill_ms([(16, 0)])
    assert 0 <= small <= pace.prefill_ms([(64, 0)]) <= pace.prefill_ms([(64, 5000)])
    assert pace.prefill_ms([(64, 5000)]) <= pace.prefill_ms([(64, 5000), (16, 0)])


def test_decode_time_of_batches_that_were_not_seen() -> None:
    pace = Pace()
    for _ in range(3):
        pace.decoded(2, 20.0)
        pace.decoded(8, 32.0)
    assert pace.decode_ms(1) == 20.0
    assert pace.decode_ms(3) == 30.0
    assert pace.decode_ms(4) == 32.0
    assert pace.decode_ms(16) == 64.0


def test_decode_time_forgets_a_slow_first_step_and_follows_slowly() -> None:
    pace = Pace()
    for ms in (900.0, 10.0, 10.0):
        pace.decoded(1, ms)
    assert pace.decode_ms(1) == pytest.approx(10.0)
    pace.decoded(1, 500.0)
    assert pace.decode_ms(1) < 15.0
    for _ in range(30):
        pace.decoded(1, 20.0)
    assert pace.decode_ms(1) == pytest.approx(20.0, rel=0.05)


def test_waiting_is_longer_behind_more_and_shorter_beside_more() -> None:
    pace = Pace()
    assert pace.wait_ms(100, 4) == 0
    for _ in range(3):
        pace.turn_ended(400.0)
    assert pace.wait_ms(4, 4) == 400.0
    assert pace.wait_ms(8, 4) == 800.0
