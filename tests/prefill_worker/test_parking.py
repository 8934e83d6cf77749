"""PrefillCore: what is parked, for how long, and how another decode worker gets it."""

from collections.abc import Sequence

import pytest
from handoff_pair import (
    DECODE,
    PREFILL,
    ROUTER,
    abort_command,
    pass_time,
    prefill_command,
    prefill_core,
    route,
    sampling,
    step_result,
)

from pagewire.engine.batch import StepResult
from pagewire.kv_transfer.messages import (
    Accepted,
    Closed,
    Committed,
    Grant,
    HandoffId,
    Open,
    Refused,
    RefuseReason,
    Seal,
)
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Connect, Effect, Emit, Send, SendFrame

PROMPT = list(range(40))  # 3 pages
SUCCESSOR = b"e" * 16
OLD_ID = HandoffId(request_id="request", attempt=1, sender=DECODE, receiver=PREFILL)
NEW_ID = HandoffId(request_id="request", attempt=2, sender=SUCCESSOR, receiver=PREFILL)


def events(effects: Sequence[Effect]) -> list[str | None]:
    return [effect.event.WhichOneof("body") for effect in effects if isinstance(effect, Emit)]


def failure(effects: Sequence[Effect]) -> "pb.FailureCode.ValueType":
    (event,) = [effect.event for effect in effects if isinstance(effect, Emit)]
    return event.failed.code


def sent(effects: Sequence[Effect]) -> list[str]:
    """Messages and frames, each with the attempt that it belongs to."""
    messages = [
        effect.message if isinstance(effect, Send) else effect.frame
        for effect in effects
        if isinstance(effect, Send | SendFrame)
    ]
    return [f"{type(message).__name__} {message.id.attempt}" for message in messages]


def repoint_command(
    attempt: int = 2, held_attempt: int = 1, ticket: bytes = b"u" * 16, request_id: str = "request"
) -> pb.WorkerCommand:
    body = pb.Repoint(
        held_attempt=held_attempt,
        ticket=ticket,
        decode=SUCCESSOR,
        transports=[pb.TransportAddress(kind="local", address=b"there")],
    )
    return pb.WorkerCommand(route=route(PREFILL, request_id, attempt), repoint=body)


def started(core: PrefillCore) -> PrefillCore:
    """The first chunk of the prompt is running."""
    core.on_command(prefill_command(PROMPT), 0.0)
    assert core.next_batch(0.0)[0] is not None
    return core


def parked(now: float = 0.0) -> PrefillCore:
    """The prompt is computed; its decode worker has gone."""
    core = started(prefill_core(max_batch_tokens=64))
    core.on_batch_done(StepResult(tokens=((7,),)), 0.0)
    assert events(core.on_peer_lost(DECODE, now)) == ["parked"]
    return core


def finish_handoff(core: PrefillCore, num_hit_pages: int = 0) -> int:
    """The successor takes everything; returns how many frames it got."""
    frames: list[SendFrame] = []
    effects = core.on_message(SUCCESSOR, Accepted(id=NEW_ID, num_hit_pages=num_hit_pages), 1.0)
    for slot in range(3):
        grant = Grant(id=NEW_ID, slot=slot, slot_generation=0)
        answer = core.on_message(SUCCESSOR, grant, 1.0)
        frames += [effect for effect in answer if isinstance(effect, SendFrame)]
    for each in frames:
        effects = core.on_frame_sent(each.frame, 5, 1.0)
    assert "Seal 2" in sent(effects)
    core.on_message(SUCCESSOR, Committed(id=NEW_ID), 1.0)
    return len(frames)


def check_nothing_is_left(core: PrefillCore) -> None:
    core.check_integrity()
    assert core.is_idle
    assert core.pool.num_available == core.pool.num_pages


def test_what_is_parked_is_handed_to_another_without_a_step() -> None:
    core = parked()
    effects = core.on_command(repoint_command(), 1.0)
    assert Connect(peer=SUCCESSOR, addresses=(("local", b"there"),)) in effects
    assert (events(effects), sent(effects)) == (["first_token"], ["Open 2"])
    assert core.state().parked_pages == 3  # until the successor has room
    assert finish_handoff(core) == 3
    assert core.state().prompt_tokens == len(PROMPT)
    assert core.next_batch(1.0) == (None, [])
    check_nothing_is_left(core)


def test_the_successor_is_sent_what_it_lacks() -> None:
    core = parked()
    core.on_command(repoint_command(), 1.0)
    assert finish_handoff(core, num_hit_pages=2) == 1
    check_nothing_is_left(core)


def test_the_seal_has_the_tokens_that_were_told_before() -> None:
    core = parked()
    core.on_command(repoint_command(), 1.0)
    effects = core.on_message(SUCCESSOR, Accepted(id=NEW_ID, num_hit_pages=3), 1.0)
    (seal,) = [effect.message for effect in effects if isinstance(effect, Send)]
    assert isinstance(seal, Seal)
    assert seal.first_tokens == (7,)


def test_what_is_computed_in_part_goes_on() -> None:
    core = started(prefill_core(max_batch_tokens=16))
    assert events(core.on_peer_lost(DECODE, 0.0)) == ["parked"]
    core.on_batch_done(StepResult(tokens=((),)), 0.0)
    assert sent(core.on_command(repoint_command(), 1.0)) == ["Open 2"]
    for _ in range(2):
        batch, _ = core.next_batch(1.0)
        assert batch is not None
        effects = core.on_batch_done(
            step_result(batch) if batch.rows[0].sampling else StepResult(tokens=((),)), 1.0
        )
    assert events(effects) == ["first_token"]
    assert finish_handoff(core) == 3
    assert core.state().prompt_tokens == len(PROMPT)
    check_nothing_is_left(core)


def test_the_router_may_know_of_the_loss_first() -> None:
    """The Repoint comes while the hand-off seems to be well, and in the middle of a step."""
    core = started(prefill_core(max_batch_tokens=64))
    effects = core.on_command(repoint_command(), 0.0)
    assert sent(effects) == ["Closed 1", "Open 2"]
    assert core.on_peer_lost(DECODE, 0.0) == []
    assert events(core.on_batch_done(StepResult(tokens=((7,),)), 0.0)) == ["first_token"]
    assert finish_handoff(core) == 3
    check_nothing_is_left(core)


def test_a_prompt_that_has_not_started_can_be_repointed() -> None:
    core = prefill_core()
    core.on_command(prefill_command(PROMPT), 0.0)
    assert core.on_command(repoint_command(), 0.0) == []
    _, effects = core.next_batch(0.0)
    assert sent(effects) == ["Open 2"]


def test_a_prompt_that_has_pages_but_no_place_in_a_step_has_not_started() -> None:
    """Found by the simulator: it was taken for one that has, and its times were wrong."""
    core = prefill_core(max_batch_tokens=40)
    core.on_command(prefill_command(PROMPT[:30], request_id="first"), 0.0)
    core.on_command(prefill_command(PROMPT), 1.0)
    first, _ = core.next_batch(2.0)
    assert first is not None and len(first.rows) == 1
    assert core.pool.counts().owned == 5  # of both
    assert core.on_command(repoint_command(), 3.0) == []
    core.on_batch_done(step_result(first), 4.0)
    second, effects = core.next_batch(4.0)
    assert second is not None and sent(effects) == ["Open 2"]
    (emitted, *_) = core.on_batch_done(step_result(second), 5.0)
    assert isinstance(emitted, Emit)
    assert emitted.event.first_token.times == pb.TimeParts(queue_s=3.0, prefill_s=1.0)


def test_a_frame_that_is_still_being_sent_ends_by_itself() -> None:
    core = started(prefill_core(max_batch_tokens=64))
    core.on_batch_done(StepResult(tokens=((7,),)), 0.0)
    core.on_message(DECODE, Accepted(id=OLD_ID, num_hit_pages=0), 0.0)
    (sending,) = core.on_message(DECODE, Grant(id=OLD_ID, slot=0, slot_generation=0), 0.0)
    assert isinstance(sending, SendFrame)
    refusal = Refused(id=OLD_ID, reason=RefuseReason.ABORTED)
    assert events(core.on_message(DECODE, refusal, 0.0)) == ["parked"]
    assert sent(core.on_command(repoint_command(), 1.0)) == ["Open 2"]
    assert sent(core.on_frame_sent(sending.frame, 5, 1.0)) == ["Closed 1"]
    assert finish_handoff(core) == 3
    check_nothing_is_left(core)


def test_a_second_refusal_of_what_is_parked_changes_nothing() -> None:
    core = parked()
    refusal = Refused(id=OLD_ID, reason=RefuseReason.ABORTED)
    effects = core.on_message(DECODE, refusal, 9.0)
    assert effects == [Send(message=Closed(id=OLD_ID.reply()))]
    assert failure(core.tick(10.1)) == pb.FAILURE_CODE_NOT_PARKED


def test_a_lease_that_runs_out_frees_the_pages() -> None:
    core = parked(now=5.0)
    assert core.tick(15.0) == []
    assert failure(core.tick(15.1)) == pb.FAILURE_CODE_NOT_PARKED
    check_nothing_is_left(core)
    assert failure(core.on_command(repoint_command(), 16.0)) == pb.FAILURE_CODE_NOT_PARKED
    assert core.on_command(repoint_command(), 16.0) == []


def test_a_refusal_for_want_of_room_parks_the_prompt() -> None:
    core = started(prefill_core(max_batch_tokens=64))
    refusal = Refused(id=OLD_ID, reason=RefuseReason.FULL)
    (event,) = [
        effect.event for effect in core.on_message(DECODE, refusal, 0.0) if isinstance(effect, Emit)
    ]
    assert event.parked.code == pb.FAILURE_CODE_FULL
    assert events(core.on_batch_done(StepResult(tokens=((7,),)), 0.0)) == ["first_token"]
    assert sent(core.on_command(repoint_command(), 1.0)) == ["Open 2"]
    assert finish_handoff(core) == 3
    check_nothing_is_left(core)


def renew_command(attempt: int = 1, sender: bytes = ROUTER) -> pb.WorkerCommand:
    to_attempt = route(PREFILL, attempt=attempt, sender=sender)
    return pb.WorkerCommand(route=to_attempt, renew_lease=pb.RenewLease())


def test_a_router_that_still_waits_renews_the_lease() -> None:
    core = parked(now=0.0)
    for second in range(1, 60):
        assert core.on_command(renew_command(), float(second)) == []
        assert pass_time(core, float(second), second + 1.0) == []
    assert failure(pass_time(core, 60.0, 69.5)) == pb.FAILURE_CODE_NOT_PARKED
    check_nothing_is_left(core)


def test_nobody_else_renews_a_lease() -> None:
    core = parked(now=0.0)
    core.on_command(renew_command(sender=b"x" * 16), 9.0)
    core.on_command(renew_command(attempt=2), 9.0)
    assert failure(pass_time(core, 9.0, 10.5)) == pb.FAILURE_CODE_NOT_PARKED


def test_what_is_not_parked_has_no_lease() -> None:
    core = started(prefill_core(max_batch_tokens=64))
    core.on_command(renew_command(), 0.0)
    assert pass_time(core, 0.0, 3.0) == []
    core.on_batch_done(StepResult(tokens=((7,),)), 3.0)
    assert core.state().parked_pages == 3


def test_a_lease_does_not_run_while_the_process_stands_still() -> None:
    core = parked()
    core.tick(0.5)
    assert core.tick(600.0) == []
    assert pass_time(core, 600.25, 608.0) == []
    assert failure(pass_time(core, 608.25, 611.0)) == pb.FAILURE_CODE_NOT_PARKED


def test_a_repoint_ends_the_lease() -> None:
    core = parked()
    core.on_command(repoint_command(), 9.0)
    assert core.tick(14.0) == []
    assert events(core.tick(14.1)) == ["parked"]  # the successor has said nothing
    assert pass_time(core, 14.2, 24.1) == []
    assert failure(core.tick(24.2)) == pb.FAILURE_CODE_NOT_PARKED


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (repoint_command(held_attempt=3), pb.FAILURE_CODE_NOT_PARKED),
        (repoint_command(request_id="other"), pb.FAILURE_CODE_NOT_PARKED),
        (repoint_command(ticket=b"short"), pb.FAILURE_CODE_INVALID),
    ],
)
def test_a_repoint_that_cannot_be_carried_out_fails(
    command: pb.WorkerCommand, code: "pb.FailureCode.ValueType"
) -> None:
    core = parked()
    assert failure(core.on_command(command, 0.0)) == code
    assert core.state().parked_pages == 3


def test_a_prefill_that_its_repoint_has_overtaken_is_not_begun() -> None:
    core = prefill_core()
    assert failure(core.on_command(repoint_command(), 0.0)) == pb.FAILURE_CODE_NOT_PARKED
    assert core.on_command(prefill_command(PROMPT), 0.0) == []
    check_nothing_is_left(core)


def test_a_router_cannot_repoint_what_another_one_sent() -> None:
    core = parked()
    command = repoint_command()
    command.route.sender = b"s" * 16
    assert failure(core.on_command(command, 0.0)) == pb.FAILURE_CODE_NOT_PARKED
    assert events(core.on_command(repoint_command(attempt=3), 0.0)) == ["first_token"]


def test_a_repeated_repoint_changes_nothing() -> None:
    core = parked()
    core.on_command(repoint_command(), 0.0)
    assert core.on_command(repoint_command(), 0.0) == []
    assert core.state().dropped_messages == 1


def test_an_abort_ends_what_is_parked() -> None:
    core = parked()
    assert core.on_command(abort_command(PREFILL), 0.0) == []
    check_nothing_is_left(core)


def test_what_ends_with_token_0_needs_no_decode_worker() -> None:
    core = prefill_core(max_batch_tokens=64)
    core.on_command(prefill_command(PROMPT, params=sampling(max_tokens=1)), 0.0)
    core.next_batch(0.0)
    core.on_peer_lost(DECODE, 0.0)
    assert events(core.on_batch_done(StepResult(tokens=((7,),)), 0.0)) == ["first_token"]
    check_nothing_is_left(core)


def test_above_the_watermark_no_prompt_starts() -> None:
    """Six of eight pages wait for a decode worker; four may."""
    core = prefill_core(num_pages=8, max_batch_tokens=64)
    for name in ("first", "second"):
        core.on_command(prefill_command(PROMPT, request_id=name), 0.0)
        batch, _ = core.next_batch(0.0)
        assert batch is not None
        core.on_batch_done(step_result(batch), 0.0)
    assert core.state().parked_pages == 6
    core.on_command(prefill_command(PROMPT[:16], request_id="third"), 0.0)
    assert core.next_batch(0.0) == (None, [])
    id = HandoffId(request_id="first", attempt=1, sender=DECODE, receiver=PREFILL)
    core.on_message(DECODE, Accepted(id=id, num_hit_pages=3), 0.0)
    assert core.state().parked_pages == 3
    assert core.next_batch(0.0)[0] is not None


def test_a_prompt_that_has_started_goes_on_above_the_watermark() -> None:
    core = started(prefill_core(num_pages=4, max_batch_tokens=16))
    core.on_batch_done(StepResult(tokens=((),)), 0.0)
    core.on_peer_lost(DECODE, 0.0)
    assert core.state().parked_pages > core.max_parked_pages
    assert core.next_batch(0.0)[0] is not None


def test_a_retry_goes_on_behind_what_was_told() -> None:
    """The last three of the token ids are output: the fourth is sampled, in its place."""
    command = prefill_command(PROMPT, attempt=2, params=sampling(max_tokens=4))
    command.prefill.num_output_tokens = 3
    core = prefill_core(max_batch_tokens=64)
    core.on_command(command, 0.0)
    batch, effects = core.next_batch(0.0)
    assert batch is not None and batch.rows[0].output_position == 3
    (opening,) = [effect.message for effect in effects if isinstance(effect, Send)]
    assert isinstance(opening, Open) and opening.num_prompt_tokens == len(PROMPT)
    (emitted, *_) = core.on_batch_done(step_result(batch), 0.0)
    assert isinstance(emitted, Emit)
    told = emitted.event.first_token
    assert (told.position, told.finish_reason) == (3, pb.FINISH_REASON_LENGTH)
    check_nothing_is_left(core)


@pytest.mark.parametrize(("num_output_tokens", "n"), [(3, None), (40, None), (2, 2)])
def test_a_retry_that_cannot_be_is_refused(num_output_tokens: int, n: int | None) -> None:
    command = prefill_command(PROMPT, params=sampling(max_tokens=3), n=n)
    command.prefill.num_output_tokens = num_output_tokens
    assert failure(prefill_core().on_command(command, 0.0)) == pb.FAILURE_CODE_INVALID
