"""A machine that sleeps, with all of its processes: when it wakes up, nobody has done wrong."""

import pytest

from pagewire.prefill_worker.core import PrefillCore
from pagewire.prefill_worker.sequence import PrefillSequence
from pagewire.proto import worker_pb2 as pb
from pagewire.sim.clients import Outcome
from pagewire.sim.faults import Faults
from pagewire.sim.scenario import random_scenario
from pagewire.sim.world import World
from pagewire.worker.effects import Effect
from pagewire.worker.standstill import Standstill

SEEDS = range(12)


def run(seed: int) -> None:
    """Everybody gets the exact tokens."""
    world = World(random_scenario(seed, faults=Faults(machine_pauses=1), deadline_s=200.0))
    world.run()
    done = world.clients.with_outcome(Outcome.DONE)
    assert len(done) == len(world.clients.streams)


@pytest.fixture
def stalls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests whose hand-off a prefill worker took for stalled."""
    found: list[str] = []
    park = PrefillCore._park

    def note(
        core: PrefillCore,
        sequence: PrefillSequence,
        code: "pb.FailureCode.ValueType",
        text: str,
        now: float,
    ) -> list[Effect]:
        if code == pb.FAILURE_CODE_STALLED:
            found.append(sequence.key.request_id)
        return park(core, sequence, code, text, now)

    monkeypatch.setattr(PrefillCore, "_park", note)
    return found


def test_no_hand_off_counts_as_stalled(stalls: list[str]) -> None:
    for seed in SEEDS:
        run(seed)
    assert not stalls


def test_without_regard_for_pauses_some_would(
    stalls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Standstill, "on_tick", lambda standstill, now: 0.0)
    for seed in SEEDS:
        run(seed)
    assert stalls
