"""What the ticks of a process say about the time between them."""

from hypothesis import given
from hypothesis import strategies as st

from pagewire.worker.standstill import Standstill


def test_the_first_tick_says_nothing() -> None:
    assert Standstill().on_tick(1e6) == 0.0


@given(st.lists(st.floats(0.0, 1.0), max_size=20))
def test_a_busy_process_does_not_stand_still(gaps: list[float]) -> None:
    standstill, now = Standstill(), 0.0
    for gap in (0.0, *gaps):
        now += gap
        assert standstill.on_tick(now) < 1e-9


@given(st.floats(1.0, 1e6))
def test_what_is_beyond_a_second_counts(gap: float) -> None:
    standstill = Standstill()
    standstill.on_tick(0.0)
    assert standstill.on_tick(gap) == gap - 1.0
    assert standstill.on_tick(gap + 0.25) == 0.0
