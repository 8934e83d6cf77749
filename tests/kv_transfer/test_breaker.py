"""When a pair gives a transport up, for how long, and what it uses meanwhile. Virtual time."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.kv_transfer.breaker import Attempts, Breaker
from pagewire.kv_transfer.circuit import (
    Circuit,
    CircuitEvent,
    CircuitLimits,
    CircuitState,
    advance,
)

LIMITS = CircuitLimits(
    max_losses=3,
    window_s=60.0,
    cooldown_s=10.0,
    max_cooldown_s=35.0,
    backoff_s=0.5,
    max_backoff_s=2.0,
)
KINDS = ("shm", "ucx", "tcp")
FAILURES = (CircuitEvent.REFUSED, CircuitEvent.STALLED)

Story = list[tuple[CircuitEvent, float]]  # events, and the time that passes before each
events = st.tuples(st.sampled_from(list(CircuitEvent)), st.floats(0, 100))
stories = st.lists(events, max_size=40)


def tell(story: Story) -> tuple[list[Circuit], float]:
    """Every circuit on the way, and the time at the end."""
    now, circuits = 0.0, [Circuit()]
    for event, pause in story:
        now += pause
        circuits.append(advance(circuits[-1], event, now, LIMITS))
    return circuits, now


def broken(breaker: Breaker, kind: str, now: float) -> None:
    breaker.report(kind, CircuitEvent.TRIED, now)
    assert breaker.report(kind, CircuitEvent.REFUSED, now)


def test_what_works_is_used() -> None:
    assert Breaker(LIMITS).attempts(KINDS, 0.0) == Attempts(kinds=KINDS, wait_s=0.0)
    assert Breaker(LIMITS).better("shm", KINDS, 0.0) is None


@pytest.mark.parametrize("failure", FAILURES)
def test_one_refusal_or_stall_is_enough(failure: CircuitEvent) -> None:
    breaker = Breaker(LIMITS)
    assert breaker.report("shm", failure, 0.0)
    assert breaker.attempts(KINDS, 9.9).kinds == ("ucx", "tcp")
    assert breaker.attempts(KINDS, 10.0).kinds == KINDS


def test_connections_may_be_lost_now_and_then() -> None:
    breaker = Breaker(LIMITS)
    assert not any(breaker.report("shm", CircuitEvent.LOST, 30.0 * number) for number in range(9))
    assert breaker.report("shm", CircuitEvent.LOST, 241.0)
    assert breaker.attempts(KINDS, 242.0).kinds == ("ucx", "tcp")


def test_a_better_transport_is_tried_once_at_a_time_and_used_when_it_works() -> None:
    breaker = Breaker(LIMITS)
    broken(breaker, "shm", 0.0)
    assert breaker.better("ucx", KINDS, 5.0) is None
    assert breaker.better("ucx", KINDS, 10.0) == "shm"
    breaker.report("shm", CircuitEvent.TRIED, 10.0)
    assert breaker.better("ucx", KINDS, 10.5) is None
    breaker.report("shm", CircuitEvent.CONNECTED, 11.0)
    assert breaker.better("ucx", KINDS, 11.0) == "shm"
    assert breaker.circuits["shm"].state is CircuitState.CLOSED


def test_cool_downs_double_up_to_a_limit() -> None:
    circuit, now, lengths = Circuit(), 0.0, []
    for _ in range(4):
        circuit = advance(circuit, CircuitEvent.TRIED, now, LIMITS)
        circuit = advance(circuit, CircuitEvent.REFUSED, now, LIMITS)
        lengths.append(circuit.cooled_down_at(LIMITS) - now)
        now = circuit.cooled_down_at(LIMITS)
    assert lengths == [10.0, 20.0, 35.0, 35.0]


def test_a_transport_that_connects_and_stalls_again_is_tried_less_and_less_often() -> None:
    circuit, now = Circuit(), 0.0
    for expected in (10.0, 20.0, 35.0):
        circuit = advance(circuit, CircuitEvent.STALLED, now, LIMITS)
        assert circuit.cooled_down_at(LIMITS) - now == expected
        now = circuit.cooled_down_at(LIMITS)
        for event in (CircuitEvent.TRIED, CircuitEvent.CONNECTED):
            circuit = advance(circuit, event, now, LIMITS)
        now += 5.0  # until the stall is noticed
    circuit = advance(circuit, CircuitEvent.STALLED, now + LIMITS.window_s, LIMITS)
    assert circuit.num_trips == 1


def test_the_only_transport_is_tried_again_soon() -> None:
    breaker = Breaker(LIMITS)
    waits, now = [], 100.0
    for _ in range(4):
        broken(breaker, "tcp", now)
        attempts = breaker.attempts(("tcp",), now)
        assert attempts.kinds == ("tcp",)
        waits.append(attempts.wait_s)
        now += attempts.wait_s
        assert breaker.attempts(("tcp",), now).wait_s == 0.0
    assert waits == [0.5, 1.0, 2.0, 2.0]


def test_when_all_have_failed_the_first_that_did_is_first() -> None:
    breaker = Breaker(LIMITS)
    for number, kind in enumerate(("ucx", "tcp", "shm")):
        broken(breaker, kind, number * 0.125)
    assert breaker.attempts(KINDS, 0.25) == Attempts(kinds=("ucx", "tcp", "shm"), wait_s=0.25)


TABLE = {
    (CircuitState.CLOSED, CircuitEvent.REFUSED): CircuitState.OPEN,
    (CircuitState.CLOSED, CircuitEvent.STALLED): CircuitState.OPEN,
    (CircuitState.OPEN, CircuitEvent.TRIED): CircuitState.HALF_OPEN,
    (CircuitState.HALF_OPEN, CircuitEvent.CONNECTED): CircuitState.CLOSED,
    (CircuitState.HALF_OPEN, CircuitEvent.REFUSED): CircuitState.OPEN,
    (CircuitState.HALF_OPEN, CircuitEvent.STALLED): CircuitState.OPEN,
    (CircuitState.HALF_OPEN, CircuitEvent.LOST): CircuitState.OPEN,
}


@pytest.mark.parametrize("state", CircuitState)
@pytest.mark.parametrize("event", CircuitEvent)
def test_every_event_in_every_state(state: CircuitState, event: CircuitEvent) -> None:
    before = Circuit(state=state, since=1.0, num_trips=1)
    after = advance(before, event, 2.0, LIMITS)
    if (state, event) in TABLE:
        assert (after.state, after.since) == (TABLE[state, event], 2.0)
    elif (state, event) == (CircuitState.CLOSED, CircuitEvent.LOST):
        assert after == replace(before, losses=(2.0,))
    else:
        assert after == before


@given(stories)
def test_every_story_keeps_its_rules(story: Story) -> None:
    circuits, _ = tell(story)
    for (event, _), before, after in zip(story, circuits, circuits[1:], strict=False):
        assert len(after.losses) < LIMITS.max_losses
        if after.num_trips != before.num_trips:
            assert after.state is CircuitState.OPEN and after.cause is event
        match before.state, after.state:
            case CircuitState.CLOSED, CircuitState.HALF_OPEN:
                pytest.fail("what works is not on trial")
            case CircuitState.OPEN, CircuitState.CLOSED:
                pytest.fail("nothing is trusted without a trial")


@given(stories)
def test_a_trial_is_always_allowed_in_the_end(story: Story) -> None:
    circuits, now = tell(story)
    assert circuits[-1].cooled_down_at(LIMITS) <= now + LIMITS.max_cooldown_s
    assert circuits[-1].backed_off_at(LIMITS) <= now + LIMITS.max_backoff_s


@given(stories)
def test_a_transport_that_works_again_is_used_again(story: Story) -> None:
    circuits, now = tell(story)
    now = max(now, circuits[-1].cooled_down_at(LIMITS))
    circuit = circuits[-1]
    for event in (CircuitEvent.TRIED, CircuitEvent.CONNECTED):
        circuit = advance(circuit, event, now, LIMITS)
    assert circuit.state is CircuitState.CLOSED


@given(st.lists(st.tuples(st.sampled_from(KINDS), events), max_size=40), st.floats(0, 100))
def test_there_always_is_something_to_try(
    story: list[tuple[str, tuple[CircuitEvent, float]]], later: float
) -> None:
    breaker, now = Breaker(LIMITS), 0.0
    for kind, (event, pause) in story:
        now += pause
        breaker.report(kind, event, now)
    attempts = breaker.attempts(KINDS, now + later)
    assert attempts.kinds and set(attempts.kinds) <= set(KINDS)
    assert 0 <= attempts.wait_s <= LIMITS.max_backoff_s
    assert breaker.better("shm", KINDS, now) is None
    assert breaker.may_forget(now + LIMITS.window_s + LIMITS.max_cooldown_s + 1.0)


def test_trips_without_end_do_not_overflow() -> None:
    circuit = replace(Circuit(), state=CircuitState.OPEN, since=1.0, num_trips=10**6)
    assert circuit.cooled_down_at(LIMITS) == 1.0 + LIMITS.max_cooldown_s
