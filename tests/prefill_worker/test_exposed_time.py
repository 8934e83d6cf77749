"""Where the time between a prompt's last chunk and the Seal of its hand-off goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.prefill_worker.exposed_time import ExposedTime
from pagewire.worker.interval import Interval


def parts(exposed: ExposedTime) -> tuple[float, float, float]:
    return (exposed.grant_wait_s, exposed.gather_s, exposed.wire_s)


def test_a_hand_off_that_waits_gathers_and_sends() -> None:
    exposed = ExposedTime()
    exposed.begin(10.0)
    exposed.waited(12.0)
    exposed.sent(17.0, Interval(12.0, 13.0))
    exposed.waited(17.5)
    assert parts(exposed) == (2.5, 1.0, 4.0)


def test_what_overlaps_with_the_computation_costs_nothing() -> None:
    exposed = ExposedTime()
    exposed.waited(3.0)
    exposed.sent(5.0, Interval(3.0, 4.0))
    assert parts(exposed) == (0.0, 0.0, 0.0)
    exposed.begin(10.0)
    exposed.sent(12.0, Interval(9.0, 10.5))
    assert parts(exposed) == (0.0, 0.5, 1.5)


def test_the_wait_for_other_frames_on_the_link_is_part_of_the_wire() -> None:
    exposed = ExposedTime()
    exposed.begin(0.0)
    exposed.sent(6.0, Interval(4.0, 5.0))
    assert parts(exposed) == (0.0, 1.0, 5.0)


def test_a_frame_that_was_not_gathered() -> None:
    exposed = ExposedTime()
    exposed.begin(0.0)
    exposed.sent(1.0, None)
    assert parts(exposed) == (0.0, 0.0, 1.0)


@given(
    before=st.integers(0, 4),
    steps=st.lists(
        st.tuples(st.booleans(), st.floats(0, 10), st.floats(0, 20), st.floats(0, 20)), max_size=12
    ),
)
def test_the_parts_are_never_negative_and_sum_to_the_time_since_the_last_chunk(
    before: int, steps: list[tuple[bool, float, float, float]]
) -> None:
    exposed = ExposedTime()
    now = begun = 100.0
    for index, (is_sent, gap, age, length) in enumerate(steps):
        if index == before:
            exposed.begin(now)
            begun = now
        now += gap
        if is_sent:
            start = now - age
            exposed.sent(now, Interval(start, min(now, start + length)))
        else:
            exposed.waited(now)
    expected = now - begun if len(steps) > before else 0.0
    assert min(parts(exposed)) >= -1e-9
    assert sum(parts(exposed)) == pytest.approx(expected, abs=1e-9)
