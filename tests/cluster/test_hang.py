"""When a worker counts as hung."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.cluster.hang import HangPolicy, HangWatch

POLICY = HangPolicy(start_s=10.0, silence_s=3.0, step_s=5.0, look_s=1.0)


def looks(heard: list[bool], policy: HangPolicy = POLICY) -> int | None:
    """After how many looks the worker counts as hung; None: it does not."""
    watch = HangWatch(policy)
    steps = [0.0 if each else None for each in heard]
    return next((number for number, each in enumerate(steps, 1) if watch.look(each)), None)


def test_one_that_was_heard_may_be_silent_for_a_time() -> None:
    assert looks([True, False, False, True, False, False]) is None
    assert looks([True, False, False, False]) == 4


def test_one_that_was_never_heard_has_longer() -> None:
    assert looks([False] * 9) is None
    assert looks([False] * 10) == 10


def test_a_look_less_often_than_the_limit_still_needs_one() -> None:
    assert looks([True, False], HangPolicy(silence_s=0.5, look_s=1.0)) == 2


def test_a_step_may_run_for_a_time() -> None:
    watch = HangWatch(POLICY)
    assert [watch.look(step_s) for step_s in (0.0, 1.0, 4.9, 0.0, 4.9)] == [None] * 5
    assert "5 s (step_timeout_s)" in (watch.look(5.0) or "")


def test_a_step_that_hangs_is_told_from_silence() -> None:
    watch = HangWatch(POLICY)
    assert [watch.look(step_s) for step_s in (4.0, None, None)] == [None] * 3
    assert watch.look(None) == "it did not answer"


@given(st.lists(st.booleans(), max_size=30))
def test_nobody_hangs_who_was_heard_just_now(heard: list[bool]) -> None:
    number = looks(heard)
    assert number is None or not any(heard[max(0, number - 3) : number])


@pytest.mark.parametrize("name", ["start_s", "silence_s", "step_s", "look_s"])
def test_a_policy_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        HangPolicy(**{name: 0.0})
