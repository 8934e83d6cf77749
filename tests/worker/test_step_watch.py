"""How long a step has run, as far as anybody could see."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.worker.step_watch import StepWatch


def test_between_steps_nothing_runs() -> None:
    watch = StepWatch()
    assert watch.look(5.0) == 0.0
    watch.begin(6.0)
    watch.end()
    assert watch.look(100.0) == 0.0


def test_every_step_is_counted_from_its_begin() -> None:
    watch = StepWatch()
    watch.begin(10.0)
    assert watch.look(10.75) == 0.75
    watch.end()
    watch.begin(11.0)
    assert watch.look(11.25) == 0.25


@given(st.lists(st.floats(0.0, 1.0), max_size=20))
def test_looks_of_a_busy_process_see_all_of_it(gaps: list[float]) -> None:
    watch, now = StepWatch(), 3.0
    watch.begin(now)
    for gap in gaps:
        now += gap
        assert watch.look(now) == pytest.approx(now - 3.0)


@given(st.floats(1.0, 1e6))
def test_a_pause_of_the_process_is_not_the_step_s(pause: float) -> None:
    watch = StepWatch()
    watch.begin(0.0)
    watch.look(0.5)
    assert watch.look(0.5 + pause) == 1.5
    assert watch.look(0.75 + pause) == pytest.approx(1.75)
