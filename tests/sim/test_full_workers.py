"""Decode workers that are full, and what a lost prefill worker leaves there, under virtual time."""

from collections import Counter
from dataclasses import replace

import pytest

from pagewire.decode_worker.admission import Admission
from pagewire.decode_worker.handoffs import Handoffs
from pagewire.decode_worker.request import DecodeRequest
from pagewire.kv_transfer.messages import RefuseReason
from pagewire.router.lifecycle import Lifecycle
from pagewire.sim.clients import Clients, Outcome
from pagewire.sim.costs import SLOW_STEPS
from pagewire.sim.faults import NO_FAULTS, Faults
from pagewire.sim.scenario import Scenario, random_scenario
from pagewire.sim.violation import InvariantViolation
from pagewire.sim.world import World
from pagewire.worker.effects import Effect

SEEDS = range(3)


def full_scenario(seed: int, max_waiting_handoffs: int = 1, faults: Faults = NO_FAULTS) -> Scenario:
    """Three routers, none of which knows what the others have promised of two small pools."""
    return Scenario(
        seed=seed,
        num_routers=3,
        prefill_pages=14,
        decode_pages=9,
        max_waiting_handoffs=max_waiting_handoffs,
        num_requests=30,
        arrival_s=0.5,
        queue_deadline_s=200.0,
        deadline_s=300.0,
        costs=SLOW_STEPS,
        faults=faults,
    )


def run(scenario: Scenario) -> Clients:
    world = World(scenario)
    world.run()
    return world.clients


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> Counter[RefuseReason]:
    """How often decode workers refuse, by reason."""
    counts: Counter[RefuseReason] = Counter()
    fail = Handoffs._fail

    def count(handoffs: Handoffs, request: DecodeRequest, reason: RefuseReason) -> list[Effect]:
        counts[reason] += 1
        return fail(handoffs, request, reason)

    monkeypatch.setattr(Handoffs, "_fail", count)
    return counts


@pytest.fixture
def takeovers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests whose Reservation another attempt has taken over."""
    taken: list[str] = []
    take_over = Admission.take_over

    def note(
        admission: Admission, request: DecodeRequest, predecessor: DecodeRequest, now: float
    ) -> None:
        if predecessor.reservation is not None:
            taken.append(request.key.request_id)
        take_over(admission, request, predecessor, now)

    monkeypatch.setattr(Admission, "take_over", note)
    return taken


@pytest.mark.parametrize("max_waiting_handoffs", [1, 2])
def test_what_is_refused_for_want_of_room_is_served_in_the_end(
    max_waiting_handoffs: int, refusals: Counter[RefuseReason]
) -> None:
    """Nothing is lost, nothing hangs, and nobody computes a prompt twice for it."""
    for seed in SEEDS:
        clients = run(full_scenario(seed, max_waiting_handoffs))
        assert len(clients.with_outcome(Outcome.DONE)) == len(clients.streams)
    assert refusals[RefuseReason.FULL] > len(SEEDS)


def test_full_workers_that_die_and_lose_each_other(refusals: Counter[RefuseReason]) -> None:
    faults = Faults(worker_kills=2, connection_losses=3)
    for seed in SEEDS:
        clients = run(full_scenario(seed, faults=faults))
        ended = clients.with_outcome(Outcome.DONE, Outcome.REFUSED)  # while a role had no worker
        assert len(ended) == len(clients.streams)
    assert refusals[RefuseReason.FULL] > 0


def test_attempts_take_over_what_lost_prefill_workers_leave(takeovers: list[str]) -> None:
    faults = Faults(worker_kills=2, connection_losses=2)
    for seed in range(8):
        scenario = random_scenario(seed, faults=faults)
        run(replace(scenario, num_prefill=3))
    assert takeovers


def test_refusals_that_count_as_failures_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lifecycle, "num_refused", property(lambda _: 0, lambda *_: None), False)
    with pytest.raises(AssertionError):
        for seed in SEEDS:
            clients = run(full_scenario(seed, max_waiting_handoffs=1))
            assert not clients.with_outcome(Outcome.FAILED)


def test_a_reservation_that_is_held_for_nobody_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "leave", lambda admission, request: None)
    monkeypatch.setattr(Admission, "expire", lambda admission, now: None)
    with pytest.raises(InvariantViolation):
        for seed in range(20):
            run(random_scenario(seed, faults=Faults(connection_losses=3)))
