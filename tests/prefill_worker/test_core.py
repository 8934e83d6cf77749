"""PrefillCore: what it refuses, what it forgets, and what it tells the router."""

import math
import re
from collections.abc import Sequence

import pytest
from handoff_pair import (
    DECODE,
    PREFILL,
    ROUTER,
    TICKET,
    abort_command,
    attach_command,
    pass_time,
    prefill_command,
    prefill_core,
    sampling,
    step_result,
)

from pagewire.engine.batch import Batch, StepResult
from pagewire.kv_transfer.messages import (
    Accepted,
    Closed,
    Committed,
    FrameAck,
    Grant,
    HandoffId,
    Message,
    Open,
    Refused,
    RefuseReason,
    Seal,
)
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Connect, Disconnect, Effect, Emit, Send, SendFrame
from pagewire.worker.interval import Interval

PROMPT = list(range(20))  # 2 pages
ID = HandoffId(request_id="request", attempt=1, sender=DECODE, receiver=PREFILL)


def event(effects: Sequence[Effect]) -> pb.WorkerEvent:
    (emitted,) = [effect.event for effect in effects if isinstance(effect, Emit)]
    return emitted


def messages(effects: Sequence[Effect]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def message_types(effects: Sequence[Effect]) -> list[type[Message]]:
    return [type(message) for message in messages(effects)]


def begin_step(core: PrefillCore) -> tuple[Batch, list[Effect]]:
    batch, effects = core.next_batch(0.0)
    assert batch is not None
    return batch, effects


def run_step(core: PrefillCore, token: int = 7) -> list[Effect]:
    batch, _ = begin_step(core)
    return core.on_batch_done(step_result(batch, token), 0.0)


def check_nothing_is_left(core: PrefillCore) -> None:
    core.check_integrity()
    assert core.is_idle
    assert core.pool.num_available == core.pool.num_pages


def computed() -> PrefillCore:
    """A core that has computed its prompt and has no credit."""
    core = prefill_core()
    core.on_command(prefill_command(PROMPT), 0.0)
    run_step(core)
    core.on_message(DECODE, Accepted(id=ID, num_hit_pages=0), 0.0)
    return core


def aged(age_s: float) -> pb.WorkerCommand:
    """A command for a request that its router has had for so long."""
    command = prefill_command(PROMPT)
    command.prefill.age_s = age_s
    return command


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (prefill_command([]), "token_ids is empty"),
        (prefill_command([100]), "token_ids holds an id outside the vocabulary of 100"),
        (prefill_command([1], params=sampling(stop_token_ids=[100])), "stop_token_ids"),
        (prefill_command([1], params=sampling(max_tokens=0)), "max_tokens is 0"),
        (prefill_command([1], params=pb.SamplingParams(max_tokens=1)), "top_p is 0.0"),
        (prefill_command([1] * 255), "255 prompt tokens and max_tokens 3 exceed"),
        (prefill_command([1], ticket=b"short"), "ticket is not 16 bytes"),
        (prefill_command([1] * 250, params=sampling(max_tokens=1)), "16 pages .* has 4"),
        (aged(-0.1), "age_s is -0.1"),
        (aged(math.nan), "age_s is nan"),
        (aged(1e9), "age_s is 1000000000.0; it must be 0 to 1000000"),
        (attach_command([1]), "a prefill worker takes no attach"),
    ],
)
def test_a_command_that_cannot_be_carried_out_fails(command: pb.WorkerCommand, text: str) -> None:
    core = prefill_core(num_pages=4)
    command.route.receiver = PREFILL
    answer = event(core.on_command(command, 0.0))
    assert answer.failed.code == pb.FAILURE_CODE_INVALID
    assert re.search(text, answer.failed.message)
    assert (answer.route.sender, answer.route.receiver) == (PREFILL, ROUTER)
    check_nothing_is_left(core)


def test_the_decode_worker_is_told_how_old_a_request_is() -> None:
    """By now: what it has waited here counts, too."""
    core = prefill_core()
    core.on_command(aged(2.5), 10.0)
    _, effects = core.next_batch(11.25)
    (opening,) = [effect.message for effect in effects if isinstance(effect, Send)]
    assert isinstance(opening, Open)
    assert opening.age_ms == 3750


def test_a_command_for_another_incarnation_is_dropped() -> None:
    core = prefill_core()
    command = prefill_command(PROMPT)
    command.route.receiver = b"x" * 16
    assert core.on_command(command, 0.0) == []
    assert core.next_batch(0.0) == (None, [])
    assert core.state().dropped_messages == 1


def test_a_repeated_command_changes_nothing() -> None:
    core = prefill_core()
    for _ in range(2):
        assert core.on_command(prefill_command(PROMPT), 0.0) == []
    assert core.state().queued == 1
    run_step(core)
    assert core.on_command(prefill_command(PROMPT), 0.0) == []
    assert core.next_batch(0.0) == (None, [])


def test_an_abort_that_overtakes_its_prefill_counts() -> None:
    core = prefill_core()
    core.on_command(abort_command(PREFILL), 0.0)
    assert core.on_command(prefill_command(PROMPT), 0.0) == []
    check_nothing_is_left(core)


def test_the_handoff_is_opened_with_the_first_chunk_only() -> None:
    core = prefill_core(max_batch_tokens=16)
    core.on_command(prefill_command(PROMPT), 0.0)
    batch, effects = begin_step(core)
    assert effects[0] == Connect(peer=DECODE, addresses=(("local", b"here"),))
    (opening,) = messages(effects)
    assert isinstance(opening, Open) and opening.ticket == TICKET
    assert (batch.num_tokens, batch.rows[0].sampling) == (16, None)
    core.on_batch_done(StepResult(tokens=((),)), 0.0)
    batch, effects = begin_step(core)
    assert effects == []
    assert (batch.rows[0].start, list(batch.rows[0].token_ids)) == (16, PROMPT[16:])
    assert batch.rows[0].sampling is not None


def test_pages_are_kept_until_the_handoff_is_committed() -> None:
    core = computed()
    frames: list[SendFrame] = []
    for slot in range(2):
        grant = Grant(id=ID, slot=slot, slot_generation=0)
        (effect,) = core.on_message(DECODE, grant, 0.0)
        assert isinstance(effect, SendFrame)
        frames.append(effect)
    assert core.pool.counts().pinned == 2
    assert core.on_frame_sent(frames[0].frame, 5, 0.0) == []
    effects = core.on_frame_sent(frames[1].frame, 6, 0.0)
    assert message_types(effects) == [Seal]
    assert event(effects).HasField("sealed")
    assert core.pool.counts().owned == 2
    for seq in range(2):
        assert core.on_message(DECODE, FrameAck(id=ID, seq=seq), 0.0) == []
    assert core.on_message(DECODE, Committed(id=ID), 0.0) == []
    check_nothing_is_left(core)


def test_the_router_learns_where_the_time_went() -> None:
    core = prefill_core(max_batch_tokens=16)
    core.on_command(prefill_command(PROMPT), 1.0)
    core.next_batch(3.0)
    core.on_batch_done(StepResult(tokens=((),)), 4.0)
    core.on_message(DECODE, Accepted(id=ID, num_hit_pages=0), 4.5)
    (hidden,) = core.on_message(DECODE, Grant(id=ID, slot=0, slot_generation=0), 4.5)
    batch, _ = core.next_batch(5.0)
    assert batch is not None
    first_token = event(core.on_batch_done(step_result(batch), 7.0)).first_token
    assert first_token.times == pb.TimeParts(queue_s=2.0, prefill_s=4.0)

    assert isinstance(hidden, SendFrame)
    assert core.on_frame_sent(hidden.frame, 5, 8.0, Interval(4.5, 7.5)) == []
    (last,) = core.on_message(DECODE, Grant(id=ID, slot=1, slot_generation=0), 10.0)
    assert isinstance(last, SendFrame)
    sealed = event(core.on_frame_sent(last.frame, 6, 13.0, Interval(10.0, 11.0))).sealed
    assert sealed.times == pb.TimeParts(grant_wait_s=2.0, gather_s=1.5, wire_s=2.5)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (sampling(max_tokens=1), pb.FINISH_REASON_LENGTH),
        (sampling(max_tokens=9, stop_token_ids=[7]), pb.FINISH_REASON_STOP),
    ],
)
def test_what_ends_with_token_0_is_not_handed_off(
    params: pb.SamplingParams, reason: "pb.FinishReason.ValueType"
) -> None:
    core = prefill_core()
    core.on_command(prefill_command(PROMPT, params=params), 0.0)
    effects = run_step(core)
    first_token = event(effects).first_token
    assert (first_token.token_id, first_token.finish_reason) == (7, reason)
    assert message_types(effects) == [Closed]
    check_nothing_is_left(core)


def test_pages_of_a_running_step_are_quarantined_until_it_ends() -> None:
    core = prefill_core()
    core.on_command(prefill_command(PROMPT), 0.0)
    begin_step(core)
    assert message_types(core.on_command(abort_command(PREFILL), 0.0)) == [Closed]
    assert core.pool.counts().quarantined == 2
    assert core.on_batch_done(StepResult(tokens=((7,),)), 0.0) == []
    check_nothing_is_left(core)


def test_pages_of_a_frame_that_is_being_sent_are_quarantined_until_it_left() -> None:
    core = computed()
    (effect,) = core.on_message(DECODE, Grant(id=ID, slot=0, slot_generation=0), 0.0)
    assert isinstance(effect, SendFrame)
    assert core.on_command(abort_command(PREFILL), 0.0) == []
    assert core.pool.counts().quarantined == 1
    assert message_types(core.on_frame_sent(effect.frame, 5, 0.0)) == [Closed]
    check_nothing_is_left(core)


def test_a_failed_step_fails_the_rows_to_blame_and_runs_the_others_again() -> None:
    core = prefill_core(max_batch_tokens=48)
    core.on_command(prefill_command([1] * 40, request_id="large"), 0.0)
    core.on_command(prefill_command([1] * 10, request_id="small"), 0.0)
    core.on_command(prefill_command([1] * 5, request_id="faulty"), 0.0)
    batch, _ = begin_step(core)
    assert [row.request_id for row in batch.rows] == ["faulty", "small", "large"]
    answer = event(core.on_batch_failed({0}))
    assert answer.route.request_id == "faulty"
    assert answer.failed.code == pb.FAILURE_CODE_INTERNAL
    again, effects = begin_step(core)
    assert again.rows == batch.rows[1:]
    assert message_types(effects) == []  # both hand-offs are open already


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (RefuseReason.LAYOUT, pb.FAILURE_CODE_INVALID),
        (RefuseReason.PREFIX, pb.FAILURE_CODE_INTEGRITY),
    ],
)
def test_a_refusal_for_good_fails_the_request(
    reason: RefuseReason, code: "pb.FailureCode.ValueType"
) -> None:
    core = computed()
    effects = core.on_message(DECODE, Refused(id=ID, reason=reason), 0.0)
    assert event(effects).failed.code == code
    assert message_types(effects) == [Closed]
    check_nothing_is_left(core)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (RefuseReason.UNKNOWN_TICKET, pb.FAILURE_CODE_PEER_LOST),
        (RefuseReason.INTEGRITY, pb.FAILURE_CODE_INTEGRITY),
        (RefuseReason.ABORTED, pb.FAILURE_CODE_PEER_LOST),
    ],
)
def test_a_refusal_that_may_pass_parks_the_prompt(
    reason: RefuseReason, code: "pb.FailureCode.ValueType"
) -> None:
    core = computed()
    effects = core.on_message(DECODE, Refused(id=ID, reason=reason), 0.0)
    assert event(effects).parked.code == code
    assert message_types(effects) == [Closed]
    assert core.state().parked_pages == 2


def test_a_refusal_of_what_is_forgotten_is_answered() -> None:
    """Found by the simulator: else the slots that D has granted for it stay out of use."""
    core = computed()
    core.on_command(abort_command(PREFILL), 0.0)
    refusal = Refused(id=ID, reason=RefuseReason.ABORTED)
    assert messages(core.on_message(DECODE, refusal, 0.0)) == [Closed(id=ID.reply())]


def test_a_refusal_is_not_answered_while_a_frame_is_on_its_way() -> None:
    core = computed()
    core.on_message(DECODE, Grant(id=ID, slot=0, slot_generation=0), 0.0)
    core.on_command(abort_command(PREFILL), 0.0)
    assert core.on_message(DECODE, Refused(id=ID, reason=RefuseReason.ABORTED), 0.0) == []


def test_messages_of_strangers_are_dropped() -> None:
    core = computed()
    stranger = HandoffId(request_id="request", attempt=1, sender=b"x" * 16, receiver=PREFILL)
    assert core.on_message(b"y" * 16, Committed(id=ID), 0.0) == []
    assert core.on_message(b"x" * 16, Grant(id=stranger, slot=0, slot_generation=0), 0.0) == []
    assert core.on_message(DECODE, Closed(id=ID), 0.0) == []
    assert core.state().dropped_messages == 3
    assert core.state().handoffs == 1


def test_a_lost_peer_parks_its_handoffs_but_not_what_is_queued() -> None:
    core = computed()
    core.on_command(prefill_command(PROMPT, request_id="queued"), 0.0)
    answer = event(core.on_peer_lost(DECODE, 0.0))
    assert answer.route.request_id == "request"
    assert answer.parked.code == pb.FAILURE_CODE_PEER_LOST
    assert core.on_peer_lost(DECODE, 0.0) == []
    assert (core.state().queued, core.state().parked_pages) == (1, 2)


def test_a_lost_router_takes_its_requests_with_it() -> None:
    core = computed()
    other = prefill_command(PROMPT, request_id="other")
    other.route.sender = b"s" * 16
    core.on_command(other, 0.0)
    assert message_types(core.on_session_lost(ROUTER)) == [Closed]
    assert (core.state().queued, core.state().handoffs) == (1, 0)


def test_a_handoff_without_progress_is_parked() -> None:
    core = computed()
    (effect,) = core.on_message(DECODE, Grant(id=ID, slot=0, slot_generation=0), 1.0)
    assert isinstance(effect, SendFrame)
    core.on_frame_sent(effect.frame, 5, 1.0)
    assert core.tick(6.0) == []
    effects = core.tick(6.1)
    assert event(effects).parked.code == pb.FAILURE_CODE_STALLED
    assert message_types(effects) == [Closed]
    assert effects[-1] == Disconnect(peer=DECODE)
    assert core.state().parked_pages == 2


def test_a_pause_of_this_process_is_no_stall() -> None:
    """The acknowledgement may be there, unread, when a machine wakes up."""
    core = computed()
    (effect,) = core.on_message(DECODE, Grant(id=ID, slot=0, slot_generation=0), 1.0)
    assert isinstance(effect, SendFrame)
    core.on_frame_sent(effect.frame, 5, 1.0)
    core.tick(1.0)
    assert core.tick(3600.0) == []
    assert pass_time(core, 3600.25, 3604.0) == []
    effects = pass_time(core, 3604.25, 3606.0)
    assert event(effects).parked.code == pb.FAILURE_CODE_STALLED


def test_a_pause_puts_nothing_off_that_began_after_it() -> None:
    core = computed()
    core.tick(1.0)
    (effect,) = core.on_message(DECODE, Grant(id=ID, slot=0, slot_generation=0), 3600.0)
    assert isinstance(effect, SendFrame)
    core.on_frame_sent(effect.frame, 5, 3600.0)
    core.tick(3600.0)  # the first after the pause
    assert pass_time(core, 3600.25, 3605.0) == []
    assert event(core.tick(3605.1)).parked.code == pb.FAILURE_CODE_STALLED


def test_a_send_that_never_ends_costs_the_connection() -> None:
    """Its pages stay in quarantine until the transport lets go of them."""
    core = computed()
    (effect,) = core.on_message(DECODE, Grant(id=ID, slot=0, slot_generation=0), 1.0)
    assert isinstance(effect, SendFrame)
    core.on_command(abort_command(PREFILL), 2.0)
    assert core.tick(31.0) == []
    assert core.tick(31.1) == [Disconnect(peer=DECODE)]
    assert core.pool.counts().quarantined == 1
    core.on_frame_sent(effect.frame, None, 32.0)
    check_nothing_is_left(core)


def test_a_frame_that_was_not_sent_is_not_sealed() -> None:
    core = computed()
    for slot in range(2):
        (effect,) = core.on_message(DECODE, Grant(id=ID, slot=slot, slot_generation=0), 0.0)
        assert isinstance(effect, SendFrame)
        assert core.on_frame_sent(effect.frame, None, 0.0) == []
    assert event(core.on_peer_lost(DECODE, 0.0)).parked.code == pb.FAILURE_CODE_PEER_LOST


def test_a_router_cannot_abort_what_another_one_sent() -> None:
    core = computed()
    abort = abort_command(PREFILL)
    abort.route.sender = b"s" * 16
    assert core.on_command(abort, 0.0) == []
    assert core.state().handoffs == 1


def test_state_counts_what_there_is() -> None:
    core = prefill_core(num_pages=2)
    core.on_command(prefill_command(PROMPT, request_id="first"), 0.0)
    core.on_command(prefill_command(PROMPT, request_id="second"), 0.0)
    run_step(core)
    state = core.state()
    assert (state.queued, state.queued_tokens, state.handoffs) == (1, 20, 1)
    assert (state.prompt_tokens, state.generated_tokens) == (20, 1)
    assert (state.pages.owned, state.pages.total) == (2, 2)
    assert core.next_batch(0.0) == (None, [])  # the pool is full
