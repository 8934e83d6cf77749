"""Continuous batching: who runs in a step."""

import pytest
from handoff_pair import route
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.decode_worker.scheduler import DecodeScheduler
from pagewire.decode_worker.sequence import DecodeSequence
from pagewire.engine.sampling_params import SamplingParams
from pagewire.worker.identity import AttemptKey


def sequence(name: str, priority: int = 0) -> DecodeSequence:
    return DecodeSequence(
        key=AttemptKey(name, 1),
        route=route(b"d" * 16, name),
        token_ids=(1,) * 5,
        sampling=SamplingParams(),
        priority=priority,
    )


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.integers(1, 6), min_size=1, max_size=12), size=st.integers(1, 4))
def test_everybody_runs_in_the_order_of_becoming_ready(steps: list[int], size: int) -> None:
    """Each sequence lives for a number of steps; one joins before every step."""
    scheduler = DecodeScheduler(size)
    left: dict[DecodeSequence, int] = {}
    first_steps: list[DecodeSequence] = []
    joining = [sequence(str(index)) for index in range(len(steps))]
    everybody = list(joining)
    while joining or left:
        if joining:
            item = joining.pop(0)
            left[item] = steps[everybody.index(item)]
            scheduler.add(item)
        batch = scheduler.schedule()
        assert batch == list(left)[:size]
        assert (scheduler.num_running, scheduler.num_waiting) == (
            len(batch),
            len(left) - len(batch),
        )
        for item in batch:
            if item not in first_steps:
                first_steps.append(item)
            left[item] -= 1
            if not left[item]:
                del left[item]
                scheduler.remove(item)
    assert first_steps == everybody
    assert scheduler.schedule() == []


@settings(max_examples=100, deadline=None)
@given(
    priorities=st.lists(st.integers(-100, 100), min_size=1, max_size=10),
    size=st.integers(1, 4),
    ageing_steps=st.integers(1, 8),
)
def test_nobody_starves_behind_those_that_never_end(
    priorities: list[int], size: int, ageing_steps: int
) -> None:
    """Every sequence gets a step once it has aged and those that aged before it had theirs."""
    scheduler = DecodeScheduler(size, ageing_steps=ageing_steps)
    everybody = [sequence(str(index), priority) for index, priority in enumerate(priorities)]
    for item in everybody:
        scheduler.add(item)
    bound = ageing_steps + 1 + -(-len(everybody) // size)
    last = dict.fromkeys(everybody, -1)
    for step in range(10 * bound):
        batch = scheduler.schedule()
        assert len(batch) == min(size, len(everybody))
        last |= dict.fromkeys(batch, step)
        assert all(step - at <= bound for at in last.values())


def test_priority_decides_who_runs() -> None:
    scheduler = DecodeScheduler(2)
    first, second, urgent = sequence("first"), sequence("second", 5), sequence("urgent", -1)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.schedule() == [first, second]
    scheduler.add(urgent)
    assert scheduler.schedule() == [first, urgent]
    scheduler.remove(first)
    assert scheduler.schedule() == [second, urgent]


def test_a_straggler_gives_its_place_to_who_has_waited_long_enough() -> None:
    scheduler = DecodeScheduler(2, ageing_steps=3)
    straggler, recent, waiting = sequence("straggler"), sequence("recent"), sequence("waiting")
    scheduler.add(straggler)
    assert scheduler.schedule() == [straggler]
    scheduler.add(recent)
    scheduler.add(waiting)
    assert [scheduler.schedule() for _ in range(3)] == [[straggler, recent]] * 3
    assert scheduler.schedule() == [recent, waiting]


def test_removal_of_the_unknown_is_no_error() -> None:
    scheduler = DecodeScheduler(1)
    scheduler.remove(sequence("unknown"))
    assert scheduler.schedule() == []


def test_a_batch_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_size is 0"):
        DecodeScheduler(0)
