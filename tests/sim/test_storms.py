"""Aborts and replays, many of them, against a few workers under virtual time."""

import pytest

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.receiver import Receiver
from pagewire.decode_worker.slots import SlotPool
from pagewire.engine.page_pool import PagePool
from pagewire.kv_transfer.messages import Open, RefuseReason
from pagewire.sim.abort_storm import AbortStorm
from pagewire.sim.replays import Replays
from pagewire.sim.violation import InvariantViolation
from pagewire.sim.worker_group import NUM_PAGES

SITUATIONS = {
    "after completion",
    "ticket of another hand-off",
    "after page reuse",
    "from another worker",
    "after a restart",
}


def check_aborts(seed: int, num_aborts: int) -> None:
    figures = AbortStorm(seed).run(num_aborts)
    assert figures.num_aborted >= num_aborts
    assert {"attached", "first_token", "tokens"} <= figures.heard.keys()
    assert figures.num_finished
    assert (figures.pages_lost, figures.slots_lost) == (0, 0)


def check_replays(seed: int, num_handoffs: int) -> None:
    figures = Replays(seed).run(num_handoffs)
    assert figures.num_replayed.keys() == SITUATIONS
    assert figures.num_accepted.total() == 0


@pytest.mark.parametrize("seed", range(3))
def test_aborts_cost_nothing(seed: int) -> None:
    check_aborts(seed, 60)


@pytest.mark.parametrize("seed", range(3))
def test_replays_gain_nothing(seed: int) -> None:
    check_replays(seed, 8)


@pytest.mark.slow
def test_ten_thousand_aborts_cost_nothing() -> None:
    check_aborts(3, 10_000)


@pytest.mark.slow
def test_many_replays_gain_nothing() -> None:
    check_replays(3, 1_000)


@pytest.mark.slow
def test_pages_that_are_not_pinned_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagePool, "pin", lambda self, pages: None)
    monkeypatch.setattr(PagePool, "unpin", lambda self, pages: None)
    with pytest.raises(InvariantViolation, match="wrong token"):
        AbortStorm(1).run(10_000)


def test_slots_that_are_kept_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotPool, "reclaim_granted", lambda self, holder: None)
    monkeypatch.setattr(DecodeCore, "tick", lambda self, now: [])
    with pytest.raises(AssertionError):
        AbortStorm(1).run(100)


def test_pages_that_are_kept_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    storm = AbortStorm(1)
    storm.run(20)
    monkeypatch.setattr(PagePool, "num_available", NUM_PAGES - 2)
    assert storm.run(0).pages_lost == 8  # two of each of four workers


def test_a_ticket_that_is_not_compared_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    on_open = Receiver.on_open

    def believe(receiver: Receiver, message: Open) -> RefuseReason | None:
        receiver._ticket = message.ticket
        return on_open(receiver, message)

    monkeypatch.setattr(Receiver, "on_open", believe)
    replays = Replays(1)
    with pytest.raises(InvariantViolation):  # the hand-off whose place was taken never begins
        replays.run(1)
    assert replays.figures.num_accepted["ticket of another hand-off"] == 1
