"""The restart policy: at once at first, ever more rarely for a worker that keeps dying."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.cluster.restart import (
    Event,
    Finish,
    Kill,
    Launch,
    Phase,
    RestartPolicy,
    Supervision,
    Terminate,
    Wait,
    decide,
)

POLICY = RestartPolicy()


def after_deaths(lives_s: list[float], policy: RestartPolicy = POLICY) -> list[float]:
    """The delay after each of several lives."""
    now = 0.0
    delays: list[float] = []
    state, action = decide(policy, Supervision(), Event.BEGIN, now)
    for life_s in lives_s:
        assert action == Launch()
        now += life_s
        state, action = decide(policy, state, Event.EXITED, now)
        assert isinstance(action, Wait)
        delays.append(action.delay_s)
        now += action.delay_s
        state, action = decide(policy, state, Event.WAITED, now)
    return delays


def test_first_deaths_are_answered_at_once_then_delays_double() -> None:
    assert after_deaths([1.0] * 10) == [0, 0, 0, 1, 2, 4, 8, 16, 30, 30]


def test_a_stable_life_forgets_earlier_deaths() -> None:
    delays = after_deaths([1.0, 1.0, 1.0, 1.0, POLICY.stable_s, 1.0, 1.0, 1.0])
    assert delays == [0, 0, 0, 1, 0, 0, 0, 1]


@given(st.lists(st.floats(0, 1e6), max_size=200))
def test_delays_are_bounded_and_never_shrink_between_stable_lives(lives_s: list[float]) -> None:
    delays = after_deaths(lives_s)
    assert all(0 <= delay <= POLICY.max_backoff_s for delay in delays)
    for index in range(1, len(delays)):
        assert delays[index] >= delays[index - 1] or delays[index] == 0


@given(st.integers(0, 10**9))
def test_delay_of_any_count_is_finite(deaths: int) -> None:
    assert 0 <= POLICY.delay_s(deaths) <= POLICY.max_backoff_s


def test_stop_ends_a_running_worker_and_waits_for_its_end() -> None:
    state, _ = decide(POLICY, Supervision(), Event.BEGIN, 0)
    state, action = decide(POLICY, state, Event.STOP, 1)
    assert action == Terminate()
    state, action = decide(POLICY, state, Event.EXITED, 2)
    assert (state.phase, action) == (Phase.ENDED, Finish())


def test_a_worker_that_hangs_is_killed_and_counts_as_dead() -> None:
    state, _ = decide(POLICY, Supervision(), Event.BEGIN, 0)
    state, action = decide(POLICY, state, Event.HUNG, 100)
    assert (state.phase, action) == (Phase.KILLING, Kill())
    state, action = decide(POLICY, state, Event.EXITED, 101)
    assert (state.phase, state.deaths, action) == (Phase.WAITING, 1, Wait(delay_s=0.0))


def test_stop_ends_a_wait() -> None:
    state, _ = decide(POLICY, Supervision(), Event.BEGIN, 0)
    state, _ = decide(POLICY, state, Event.EXITED, 1)
    assert decide(POLICY, state, Event.STOP, 2).action == Finish()


@given(st.sampled_from(Phase), st.sampled_from(Event))
def test_every_event_is_answered_or_refused(phase: Phase, event: Event) -> None:
    try:
        state, action = decide(POLICY, Supervision(phase=phase), event, 1.0)
    except ValueError as error:
        assert phase in str(error)
        return
    assert (action == Finish()) == (state.phase is Phase.ENDED)
    assert (action == Launch()) == (state.phase is Phase.RUNNING)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"quick_restarts": -1}, "quick_restarts"),
        ({"backoff_s": 0.0}, "backoff_s"),
        ({"backoff_s": 60.0}, "backoff_s"),
        ({"stable_s": 0.0}, "stable_s"),
    ],
)
def test_policy_that_cannot_be_is_refused(arguments: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RestartPolicy(**arguments)  # type: ignore[arg-type]
