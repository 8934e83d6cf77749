"""Does the simulator see? Faults that are planted in the cores must be caught."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.handoffs import Handoffs
from pagewire.decode_worker.page_copies import PageCopies
from pagewire.decode_worker.receiver import Receiver, ReceiverState
from pagewire.decode_worker.request import DecodeRequest
from pagewire.decode_worker.running_batch import RunningBatch
from pagewire.decode_worker.sequence import DecodeSequence
from pagewire.engine.batch import Batch
from pagewire.engine.page_pool import PagePool
from pagewire.kv_transfer.messages import Frame, Message, RefuseReason
from pagewire.prefill_worker.core import PrefillCore
from pagewire.prefill_worker.sender import Sender, SenderState
from pagewire.prefill_worker.sequence import PrefillSequence
from pagewire.proto import worker_pb2 as pb
from pagewire.router.dispatch import DispatchCore
from pagewire.router.lifecycle import Lifecycle
from pagewire.router.token_log import TokenLog
from pagewire.sim.clients import Outcome
from pagewire.sim.costs import SLOW_STEPS, Costs, Range
from pagewire.sim.faults import Faults, MessageFaults
from pagewire.sim.kv_memory import LAYOUT, KvMemory
from pagewire.sim.model import SimModel
from pagewire.sim.scenario import Scenario, random_scenario
from pagewire.sim.violation import InvariantViolation
from pagewire.sim.world import World
from pagewire.worker.effects import Effect

MAX_RUNS = 40
FAULTS = Faults(
    peer_messages=MessageFaults(repeat=0.1, reorder=0.1, corrupt=0.05),
    session_messages=MessageFaults(repeat=0.1),
    connection_losses=1,
)

SLOW_WIRE = Costs(wire=Range(low=0.0, high=0.3))

LOSSES = Faults(worker_kills=2, connection_losses=2)

Plant = Callable[[pytest.MonkeyPatch], None]


def pages_are_not_pinned(patch: pytest.MonkeyPatch) -> None:
    def ignore(pool: PagePool, pages: Iterable[int]) -> None:
        pass

    patch.setattr(PagePool, "pin", ignore)
    patch.setattr(PagePool, "unpin", ignore)


def pages_are_not_released(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "release", lambda pool, pages: None)


def the_last_page_is_not_released(patch: pytest.MonkeyPatch) -> None:
    release = PagePool.release
    patch.setattr(PagePool, "release", lambda pool, pages: release(pool, list(pages)[:-1]))


def promises_are_not_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "cancel", lambda pool, reservation: None)


def what_has_begun_to_land_is_kept(patch: pytest.MonkeyPatch) -> None:
    on_landing = Receiver.on_landing

    def receive(receiver: Receiver, frame: Frame) -> None:
        on_landing(receiver, frame)
        receiver._received = receiver._covered.copy()

    patch.setattr(Receiver, "on_landing", receive)


def the_log_accepts_anything(patch: pytest.MonkeyPatch) -> None:
    def append(log: TokenLog, position: int, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        log.token_ids += token_ids
        return token_ids

    patch.setattr(TokenLog, "append", append)


def requests_end_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lifecycle, "is_live", True)


def capacity_is_settled_twice(patch: pytest.MonkeyPatch) -> None:
    settle = DispatchCore._settle_decode

    def settle_twice(core: DispatchCore, lifecycle: Lifecycle) -> None:
        request_id = lifecycle.request.request_id
        projection = core._promised.get(request_id)
        settle(core, lifecycle)
        if projection is not None:
            core._promised[request_id] = projection
            settle(core, lifecycle)

    patch.setattr(DispatchCore, "_settle_decode", settle_twice)


def capacity_is_not_settled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DispatchCore, "_settle_decode", lambda core, lifecycle: None)


def a_seal_is_believed(patch: pytest.MonkeyPatch) -> None:
    def become_ready(receiver: Receiver) -> RefuseReason | None:
        if receiver.seal is not None and not receiver._landing:
            receiver.state = ReceiverState.READY
        return None

    patch.setattr(Receiver, "_become_ready_if_complete", become_ready)


def checksums_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("pagewire.sim.outbox.checksum", lambda payload: 0)
    patch.setattr("pagewire.sim.decode.checksum", lambda payload: 0)


def nobody_ends_a_refused_handoff(patch: pytest.MonkeyPatch) -> None:
    def release(sender: Sender) -> list[Message]:
        sender.state = SenderState.RELEASED
        return []

    patch.setattr(Sender, "_release", release)
    patch.setattr(DecodeCore, "tick", lambda core, now: [])


def a_running_step_loses_its_pages(patch: pytest.MonkeyPatch) -> None:
    end = RunningBatch.end

    def end_carelessly(batch: RunningBatch, request: DecodeRequest) -> None:
        steps, batch._steps = batch._steps, []
        end(batch, request)
        batch._steps = steps

    patch.setattr(RunningBatch, "end", end_carelessly)


def pages_are_freed_before_the_last_step_ends(patch: pytest.MonkeyPatch) -> None:
    """With the older of the two that are out, and not with the one that was launched behind it."""
    release = RunningBatch._release

    def release_carelessly(batch: RunningBatch, sequence: DecodeSequence) -> None:
        batch._steps.reverse()
        release(batch, sequence)
        batch._steps.reverse()

    patch.setattr(RunningBatch, "_release", release_carelessly)


def copies_are_not_made(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KvMemory, "copy", lambda memory, source, destination: None)


def copies_are_made_once_only(patch: pytest.MonkeyPatch) -> None:
    """Not again when the step that was to make them has failed."""
    patch.setattr(PageCopies, "retry", PageCopies.finish)


def stopped_choices_run_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lifecycle, "stop_choice", lambda lifecycle, choice: [])


def a_seal_is_dated_back(patch: pytest.MonkeyPatch) -> None:
    on_seal = Handoffs._on_seal
    patch.setattr(Handoffs, "_on_seal", lambda handoffs, seal, now: on_seal(handoffs, seal, 0.0))


def layers_leave_before_they_are_computed(patch: pytest.MonkeyPatch) -> None:
    compute = SimModel.compute_layers

    def compute_all_or_nothing(model: SimModel, batch: Batch, num_layers: int) -> None:
        if num_layers == LAYOUT.num_layers:
            compute(model, batch, num_layers)

    patch.setattr(SimModel, "compute_layers", compute_all_or_nothing)


def parked_pages_are_freed(patch: pytest.MonkeyPatch) -> None:
    park = PrefillCore._park

    def park_and_free(
        core: PrefillCore,
        sequence: PrefillSequence,
        code: "pb.FailureCode.ValueType",
        text: str,
        now: float,
    ) -> list[Effect]:
        core.pool.release(sequence.pages)
        return park(core, sequence, code, text, now)

    patch.setattr(PrefillCore, "_park", park_and_free)


def a_repoint_sends_what_is_not_computed(patch: pytest.MonkeyPatch) -> None:
    resume = PrefillCore._resume

    def resume_hastily(core: PrefillCore, sequence: PrefillSequence, now: float) -> list[Effect]:
        effects = resume(core, sequence, now)
        sequence.sender.on_computed(len(sequence.token_ids), now)
        return effects

    patch.setattr(PrefillCore, "_resume", resume_hastily)


def a_retry_repeats_a_token(patch: pytest.MonkeyPatch) -> None:
    told = Lifecycle._told
    patch.setattr(Lifecycle, "_told", lambda lifecycle: told(lifecycle) + told(lifecycle)[-1:])


def busy_scenario(seed: int, costs: Costs, *, runs_ahead: bool = False) -> Scenario:
    """One decode worker whose pages change hands all the time."""
    return Scenario(
        seed=seed,
        num_prefill=3,
        num_decode=1,
        decode_pages=40,
        max_batch_size=8,
        num_slots=12,
        num_requests=120,
        max_output_tokens=24,
        cancel_probability=0.6,
        costs=costs,
        runs_ahead=runs_ahead,
    )


def overtaking_scenario(seed: int) -> Scenario:
    """Frames of hand-offs that have ended still land after those of hand-offs that have begun.

    These come from other prefill workers, and the pages that were freed last are the first to be
    used again.
    """
    return Scenario(
        seed=seed,
        num_prefill=6,
        num_decode=1,
        prefill_pages=64,
        decode_pages=64,
        max_batch_size=16,
        num_slots=24,
        num_requests=60,
        arrival_s=1.0,
        max_choices=1,
        shared_prefix_probability=0.0,
        cancel_probability=0.8,
        costs=Costs(wire=Range(low=0.0, high=0.5)),
    )


def crowded_scenario(seed: int) -> Scenario:
    """Steps fail in which many requests run, and of these only one fails with it."""
    return Scenario(
        seed=seed,
        num_decode=1,
        decode_pages=96,
        max_batch_size=16,
        num_requests=40,
        arrival_s=0.5,
        faults=Faults(step_failure=0.05),
    )


def interrupted_scenario(seed: int) -> Scenario:
    """Hand-offs end while frames land, and those that follow begin with the same pages."""
    scenario = random_scenario(
        seed, faults=Faults(connection_losses=2), cancel_probability=0.4, deadline_s=10.0
    )
    return replace(scenario, costs=SLOW_WIRE, num_decode=1, shared_prefix_probability=1.0)


@pytest.mark.parametrize("costs", [SLOW_WIRE, SLOW_STEPS])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_without_a_bug_nothing_is_noticed(costs: Costs, runs_ahead: bool) -> None:
    for seed in range(3):
        World(busy_scenario(seed, costs, runs_ahead=runs_ahead)).run()


def test_hand_offs_that_end_while_frames_land_leave_no_wrong_page() -> None:
    for seed in range(10):
        World(interrupted_scenario(seed)).run()
    for seed in range(3):
        World(overtaking_scenario(seed)).run()


def test_a_page_that_is_kept_before_it_is_here_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    what_has_begun_to_land_is_kept(monkeypatch)
    with pytest.raises(InvariantViolation, match="wrong token"):
        for seed in range(MAX_RUNS):
            World(interrupted_scenario(seed)).run()


def test_a_page_that_is_freed_while_a_step_runs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    a_running_step_loses_its_pages(monkeypatch)
    with pytest.raises(InvariantViolation, match="wrong token"):
        for seed in range(MAX_RUNS):
            World(busy_scenario(seed, SLOW_STEPS)).run()


def test_a_page_that_is_freed_while_a_frame_lands_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages_are_not_pinned(monkeypatch)
    with pytest.raises(InvariantViolation, match="wrong token"):
        for seed in range(MAX_RUNS):
            World(overtaking_scenario(seed)).run()


def test_a_page_that_a_step_ahead_still_uses_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pages_are_freed_before_the_last_step_ends(monkeypatch)
    with pytest.raises(InvariantViolation, match="wrong token"):
        for seed in range(MAX_RUNS):
            World(busy_scenario(seed, SLOW_STEPS, runs_ahead=True)).run()


@pytest.mark.parametrize("plant", [copies_are_not_made, copies_are_made_once_only])
def test_a_missing_copy_of_a_shared_page_is_noticed(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(InvariantViolation, match="wrong token"):
        for seed in range(MAX_RUNS):
            World(crowded_scenario(seed)).run()


def test_a_layer_that_leaves_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layers_leave_before_they_are_computed(monkeypatch)
    with pytest.raises(InvariantViolation, match="wrong token"):
        for seed in range(MAX_RUNS):
            World(random_scenario(seed)).run()


def test_times_that_overlap_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    a_seal_is_dated_back(monkeypatch)
    with pytest.raises(InvariantViolation, match="was told of"):
        for seed in range(MAX_RUNS):
            World(random_scenario(seed)).run()


@pytest.mark.parametrize(
    "plant",
    [parked_pages_are_freed, a_repoint_sends_what_is_not_computed, a_retry_repeats_a_token],
)
def test_a_retry_that_goes_wrong_is_noticed(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(MAX_RUNS):
            world = World(random_scenario(seed, faults=LOSSES))
            world.run()
            assert not world.clients.with_outcome(Outcome.FAILED)


@pytest.mark.parametrize(
    "plant",
    [
        pages_are_not_released,
        the_last_page_is_not_released,
        promises_are_not_given_back,
        the_log_accepts_anything,
        requests_end_twice,
        capacity_is_settled_twice,
        capacity_is_not_settled,
        a_seal_is_believed,
        checksums_are_not_compared,
        nobody_ends_a_refused_handoff,
        stopped_choices_run_on,
    ],
)
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(MAX_RUNS):
            scenario = random_scenario(seed, faults=FAULTS, cancel_probability=0.4, deadline_s=10.0)
            World(scenario).run()
