"""Whole clusters under virtual time, one run per seed; a failing test's name holds its seed.

What must hold after every event is checked inside the run. Here: how requests may end.
"""

from collections.abc import Callable

import pytest

from pagewire.sim.clients import Clients, Outcome
from pagewire.sim.faults import Faults, MessageFaults
from pagewire.sim.scenario import random_scenario
from pagewire.sim.world import World

SEEDS = range(40)
MANY_SEEDS = range(1_000, 3_000)

REPEATED = Faults(
    peer_messages=MessageFaults(repeat=0.2),
    session_messages=MessageFaults(repeat=0.2),
)
DISTURBED = Faults(
    peer_messages=MessageFaults(repeat=0.1, reorder=0.1, corrupt=0.02),
    session_messages=MessageFaults(repeat=0.1, reorder=0.03),
)
LOSSES = Faults(
    peer_messages=MessageFaults(repeat=0.05, corrupt=0.01),
    session_messages=MessageFaults(repeat=0.05),
    worker_kills=2,
    connection_losses=2,
)
BROKEN = Faults(
    peer_messages=MessageFaults(repeat=0.05, reorder=0.02, corrupt=0.01),
    session_messages=MessageFaults(repeat=0.05, reorder=0.01),
    step_failure=0.01,
    worker_kills=2,
    worker_stops=1,
    connection_losses=2,
    session_losses=1,
)


def run(seed: int, *, faults: Faults, cancel_probability: float, deadline_s: float) -> Clients:
    scenario = random_scenario(
        seed, faults=faults, cancel_probability=cancel_probability, deadline_s=deadline_s
    )
    world = World(scenario)
    world.run()
    return world.clients


def check_without_faults(seed: int) -> None:
    """Everybody gets the exact tokens."""
    clients = run(seed, faults=Faults(), cancel_probability=0.0, deadline_s=60.0)
    assert len(clients.with_outcome(Outcome.DONE)) == len(clients.streams)


def check_hang_ups_and_repetitions(seed: int) -> None:
    """Neither clients that hang up nor repeated messages disturb anybody else."""
    clients = run(seed, faults=REPEATED, cancel_probability=0.4, deadline_s=60.0)
    ended = clients.with_outcome(Outcome.DONE, Outcome.CANCELLED)
    assert len(ended) == len(clients.streams)


def check_disturbed_messages(seed: int) -> None:
    """A request may fail of what its messages suffered, but at once: never of a deadline."""
    clients = run(seed, faults=DISTURBED, cancel_probability=0.2, deadline_s=60.0)
    codes = {stream.error.code for stream in clients.streams.values() if stream.error is not None}
    assert codes <= {"stream_broken", "handoff_corrupt", "worker_lost"}


def check_losses(seed: int) -> None:
    """Workers die and lose each other, frames are damaged: everybody gets the exact tokens."""
    clients = run(seed, faults=LOSSES, cancel_probability=0.0, deadline_s=60.0)
    ended = clients.with_outcome(Outcome.DONE, Outcome.REFUSED)  # while a role had no worker at all
    assert len(ended) == len(clients.streams)


def check_broken_cluster(seed: int) -> None:
    """Workers die, freeze and lose each other: every request still ends, and nothing is left."""
    run(seed, faults=BROKEN, cancel_probability=0.2, deadline_s=10.0)


def check_dying_router(seed: int) -> None:
    """A router dies: its clients lose their streams, the workers nothing else."""
    faults = Faults(router_kills=1, session_losses=1)
    run(seed, faults=faults, cancel_probability=0.2, deadline_s=10.0)


CHECKS = (
    check_without_faults,
    check_hang_ups_and_repetitions,
    check_disturbed_messages,
    check_losses,
    check_broken_cluster,
    check_dying_router,
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_run(seed: int, check: Callable[[int], None]) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_many_runs(check: Callable[[int], None]) -> None:
    for seed in MANY_SEEDS:
        check(seed)


def test_one_seed_is_one_run() -> None:
    scenario = random_scenario(7, faults=BROKEN, cancel_probability=0.3, deadline_s=10.0)
    first, second = World(scenario), World(scenario)
    first.run()
    second.run()
    assert first.now == second.now
    assert [repr(stream) for stream in first.clients.streams.values()] == [
        repr(stream) for stream in second.clients.streams.values()
    ]
