"""DecodeCore: what it refuses, whom it admits, and what it keeps out of use for how long."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from handoff_pair import (
    DECODE,
    HASHER,
    LAYOUT,
    PREFILL,
    ROUTER,
    TICKET,
    abort_command,
    attach_command,
    decode_core,
    pass_time,
    prefill_command,
    sampling,
    step_result,
)

from pagewire.decode_worker.core import DecodeCore
from pagewire.engine.batch import StepResult
from pagewire.kv_transfer.checksum import EMPTY_DIGEST, extend_digest
from pagewire.kv_transfer.messages import (
    Accepted,
    Closed,
    Committed,
    Frame,
    FrameAck,
    Grant,
    HandoffId,
    Message,
    Open,
    Refused,
    RefuseReason,
    Renew,
    Seal,
)
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Disconnect, Effect, Emit, Scatter, Send, Verify
from pagewire.worker.identity import prefix_hash

PROMPT = list(range(20))  # 2 pages
LONG_PROMPT = list(range(40))  # 3 pages, of which 2 are full
LONG_HASH = prefix_hash(LONG_PROMPT)
CHECKSUM = 5


def handoff_id(request_id: str = "request") -> HandoffId:
    return HandoffId(request_id=request_id, attempt=1, sender=PREFILL, receiver=DECODE)


def events(effects: Sequence[Effect]) -> list[pb.WorkerEvent]:
    return [effect.event for effect in effects if isinstance(effect, Emit)]


def failure(effects: Sequence[Effect]) -> pb.Failed:
    (event,) = events(effects)
    assert event.HasField("failed")
    return event.failed


def messages(effects: Sequence[Effect]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def grants(effects: Sequence[Effect]) -> list[Grant]:
    return [message for message in messages(effects) if isinstance(message, Grant)]


def opening(request_id: str = "request", prompt: Sequence[int] = PROMPT) -> Open:
    return Open(
        id=handoff_id(request_id),
        ticket=TICKET,
        num_prompt_tokens=len(prompt),
        layout=LAYOUT,
        prefix_hash=prefix_hash(prompt),
        age_ms=0,
    )


def frame(grant: Grant, seq: int, request_id: str = "request") -> Frame:
    return Frame(
        id=handoff_id(request_id),
        seq=seq,
        slot=grant.slot,
        slot_generation=grant.slot_generation,
        first_page=seq,
        num_pages=1,
        first_layer=0,
        num_layers=LAYOUT.num_layers,
        layout_digest=LAYOUT.digest(),
        prefix_hash=prefix_hash(PROMPT),
        checksum=CHECKSUM,
    )


def seal(request_id: str = "request", first_token: int = 7) -> Seal:
    digest = extend_digest(extend_digest(EMPTY_DIGEST, CHECKSUM), CHECKSUM)
    return Seal(id=handoff_id(request_id), num_frames=2, digest=digest, first_tokens=(first_token,))


def begin(
    core: DecodeCore,
    request_id: str = "request",
    max_tokens: int = 3,
    prompt: Sequence[int] = PROMPT,
) -> list[Effect]:
    """Attach and Open; returns what the Open led to."""
    command = attach_command(prompt, request_id=request_id, params=sampling(max_tokens=max_tokens))
    core.on_command(command, 0.0)
    return core.on_message(PREFILL, opening(request_id, prompt), 0.0)


def land(core: DecodeCore, item: Frame) -> list[Effect]:
    """Header and payload of a frame; returns the Verify."""
    place, effects = core.place(PREFILL, item, LAYOUT.page_bytes)
    assert place is not None and effects == []
    assert place.slot == item.slot and place.page_table is not None
    return core.on_message(PREFILL, item, 0.0)


def hand_off(core: DecodeCore, request_id: str = "request", max_tokens: int = 3) -> list[Effect]:
    """A whole hand-off; returns what its last event led to."""
    credit = grants(begin(core, request_id, max_tokens))
    for seq in range(2):
        land(core, frame(credit[seq], seq, request_id))
        core.on_scattered(frame(credit[seq], seq, request_id), True, 0.0)
    return core.on_message(PREFILL, seal(request_id), 0.0)


def check_nothing_is_left(core: DecodeCore) -> None:
    core.check_integrity()
    assert core.is_idle
    assert core.pool.num_available == core.pool.num_pages


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (attach_command([]), "token_ids is empty"),
        (attach_command([100]), "token_ids holds an id outside the vocabulary of 100"),
        (attach_command([1] * 255), "255 prompt tokens and max_tokens 3 exceed"),
        (attach_command([1], ticket=b""), "ticket is not 16 bytes"),
        (attach_command([1] * 63), "prompt, max_tokens and n take 5 pages of KV cache; .* has 4"),
        (prefill_command([1]), "a decode worker takes no prefill"),
    ],
)
def test_a_command_that_cannot_be_carried_out_fails(command: pb.WorkerCommand, text: str) -> None:
    core = decode_core(num_pages=4)
    command.route.receiver = DECODE
    answer = failure(core.on_command(command, 0.0))
    assert answer.code == pb.FAILURE_CODE_INVALID
    assert re.search(text, answer.message)
    check_nothing_is_left(core)


def test_the_last_token_needs_no_page() -> None:
    core = decode_core(num_pages=4)
    effects = core.on_command(attach_command([1] * 62), 0.0)
    assert events(effects)[0].HasField("attached")


def test_commands_that_do_not_count() -> None:
    core = decode_core()
    foreign = attach_command(PROMPT)
    foreign.route.receiver = b"x" * 16
    assert core.on_command(foreign, 0.0) == []
    core.on_command(attach_command(PROMPT), 0.0)
    assert core.on_command(attach_command(PROMPT), 0.0) == []
    core.on_command(abort_command(DECODE), 0.0)
    assert core.on_command(attach_command(PROMPT), 0.0) == []
    assert core.on_command(abort_command(DECODE), 0.0) == []
    assert core.state().dropped_messages == 3
    check_nothing_is_left(core)


def test_a_handoff_becomes_tokens() -> None:
    core = decode_core()
    effects = hand_off(core)
    assert [type(message) for message in messages(effects)] == [Committed]
    assert events(effects)[0].HasField("ready")
    batch, _ = core.next_batch(0.0)
    assert batch is not None
    (row,) = batch.rows
    assert (list(row.token_ids), row.start, row.output_position) == ([7], 20, 1)
    (first,) = events(core.on_batch_done(StepResult(tokens=((8,),)), 0.0))
    assert (first.tokens.position, list(first.tokens.token_ids)) == (0, [7, 8])
    core.next_batch(0.0)
    (last,) = events(core.on_batch_done(StepResult(tokens=((9,),)), 0.0))
    assert (last.tokens.position, list(last.tokens.token_ids)) == (2, [9])
    assert last.tokens.finish_reason == pb.FINISH_REASON_LENGTH
    assert core.state().generated_tokens == 2
    check_nothing_is_left(core)


def test_the_router_learns_where_the_time_went() -> None:
    core = decode_core()
    credit = grants(begin(core))
    frames = [frame(credit[seq], seq) for seq in range(2)]
    for item in frames:
        land(core, item)
    core.on_scattered(frames[0], True, 1.0)
    core.on_message(PREFILL, seal(), 2.0)
    (event,) = events(core.on_scattered(frames[1], True, 5.0))
    assert event.ready.times == pb.TimeParts(scatter_s=3.0)
    core.next_batch(7.0)
    (event,) = events(core.on_batch_done(StepResult(tokens=((8,),)), 7.5))
    assert event.tokens.times == pb.TimeParts(decode_queue_s=2.0, decode_s=0.5)
    core.next_batch(8.0)
    (event,) = events(core.on_batch_done(StepResult(tokens=((9,),)), 9.0))
    assert not event.tokens.HasField("times")


def test_frames_are_acknowledged_and_slots_granted_again() -> None:
    core = decode_core(num_slots=1)
    (credit,) = grants(begin(core))
    (verify,) = land(core, frame(credit, 0))
    assert isinstance(verify, Verify)
    assert core.pool.counts().pinned == 1
    effects = core.on_scattered(verify.frame, True, 0.0)
    assert messages(effects)[0] == FrameAck(id=handoff_id().reply(), seq=0)
    (again,) = grants(effects)
    assert (again.slot, again.slot_generation) == (credit.slot, credit.slot_generation + 1)


def test_slots_are_shared_evenly() -> None:
    core = decode_core(num_slots=6)
    assert len(grants(begin(core, "first"))) == 4
    assert len(grants(begin(core, "second"))) == 2


def test_reservations_are_made_in_order_and_never_exceed_the_pool() -> None:
    core = decode_core(num_pages=5, num_slots=4)
    assert grants(begin(core, "first"))  # 2 pages
    assert not grants(begin(core, "large", max_tokens=60))  # 5 pages
    assert not grants(begin(core, "small"))  # has room, but does not overtake
    assert core.state().queued == 2
    core.on_command(abort_command(DECODE, "first"), 0.0)
    effects = core.on_message(PREFILL, Closed(id=handoff_id("first")), 0.0)
    assert {grant.id.request_id for grant in grants(effects)} == {"large"}
    assert core.pool.num_available == 0


def test_whoever_waits_is_admitted_when_a_quarantine_ends() -> None:
    """The pages of an aborted hand-off are free only once the frame in them is verified."""
    core = decode_core(num_pages=2, num_slots=4)
    credit, *_ = grants(begin(core, "first"))
    (verify,) = land(core, frame(credit, 0, "first"))
    assert isinstance(verify, Verify)
    begin(core, "second")
    core.on_command(abort_command(DECODE, "first"), 0.0)
    core.on_message(PREFILL, Closed(id=handoff_id("first")), 0.0)
    assert core.pool.counts().quarantined == 1
    assert core.state().queued == 1
    assert grants(core.on_scattered(verify.frame, True, 0.0))
    assert core.state().queued == 0


def test_pages_in_which_a_frame_lands_outlive_their_handoff() -> None:
    """The peer may still write there, until the frame or the connection has ended."""
    core = decode_core(num_pages=2, num_slots=4)
    credit, *_ = grants(begin(core, "first"))
    core.place(PREFILL, frame(credit, 0, "first"), LAYOUT.page_bytes)
    begin(core, "second")
    core.on_command(abort_command(DECODE, "first"), 0.0)
    assert core.pool.counts().quarantined == 1
    assert core.state().queued == 1
    core.on_message(PREFILL, frame(credit, 0, "first"), 0.0)
    assert core.pool.counts().quarantined == 0
    assert core.state().queued == 0


def test_pages_in_which_a_frame_landed_are_free_when_its_peer_is_lost() -> None:
    core = decode_core(num_pages=2, num_slots=4)
    credit, *_ = grants(begin(core))
    core.place(PREFILL, frame(credit, 0), LAYOUT.page_bytes)
    core.on_command(abort_command(DECODE), 0.0)
    assert core.pool.counts().quarantined == 1
    core.on_peer_lost(PREFILL, 0.0)
    check_nothing_is_left(core)


def test_no_frame_lands_where_another_one_has() -> None:
    core = decode_core()
    credit = grants(begin(core))
    land(core, frame(credit[0], 0))
    again = replace(frame(credit[1], 1), first_page=0)
    place, effects = core.place(PREFILL, again, LAYOUT.page_bytes)
    assert place is None
    assert messages(effects) == [Refused(id=handoff_id().reply(), reason=RefuseReason.INTEGRITY)]


def test_pages_of_another_size_are_written_from_a_slot() -> None:
    core = decode_core(layout=replace(LAYOUT, page_size=32))
    credit, *_ = grants(begin(core))
    item = frame(credit, 0)
    place, _ = core.place(PREFILL, item, LAYOUT.page_bytes)
    assert place is not None and place.page_table is None
    assert core.pool.counts().pinned == 0
    (effect,) = core.on_message(PREFILL, item, 0.0)
    assert isinstance(effect, Scatter)
    assert core.pool.counts().pinned == 1


def test_slots_of_an_aborted_handoff_stay_out_of_use_until_closed() -> None:
    core = decode_core(num_slots=2)
    begin(core)
    effects = core.on_command(abort_command(DECODE), 0.0)
    assert messages(effects) == [Refused(id=handoff_id().reply(), reason=RefuseReason.ABORTED)]
    assert core.pool.num_available == core.pool.num_pages
    assert core.slots.num_free == 0
    assert not core.is_idle
    core.on_message(PREFILL, Closed(id=handoff_id()), 0.0)
    check_nothing_is_left(core)


def test_a_worker_that_does_not_close_what_was_refused_is_disconnected() -> None:
    core = decode_core(num_slots=2)
    begin(core)
    core.on_command(abort_command(DECODE), 100.0)
    assert pass_time(core, 100.1, 105.1) == []
    assert core.tick(105.2) == [Disconnect(peer=PREFILL)]
    assert core.slots.num_free == 0  # no time-out frees them
    core.on_peer_lost(PREFILL, 0.0)
    assert core.tick(106.0) == []
    check_nothing_is_left(core)


def test_a_frame_larger_than_a_slot_ends_the_handoff() -> None:
    core = decode_core(slot_bytes=LAYOUT.layer_bytes)
    credit, *_ = grants(begin(core))
    place, effects = core.place(PREFILL, frame(credit, 0), LAYOUT.page_bytes)
    assert place is None
    assert messages(effects) == [Refused(id=handoff_id().reply(), reason=RefuseReason.LAYOUT)]


def test_a_router_cannot_abort_what_another_one_sent() -> None:
    core = decode_core()
    hand_off(core)
    abort = abort_command(DECODE)
    abort.route.sender = b"s" * 16
    assert core.on_command(abort, 0.0) == []
    assert core.next_batch(0.0)[0] is not None


def test_a_lost_peer_does_not_concern_what_has_landed() -> None:
    core = decode_core()
    credit = grants(begin(core))
    for seq in range(2):
        land(core, frame(credit[seq], seq))
    core.on_message(PREFILL, seal(), 0.0)
    assert core.on_peer_lost(PREFILL, 0.0) == []
    effects = [
        effect
        for seq in range(2)
        for effect in core.on_scattered(frame(credit[seq], seq), True, 0.0)
    ]
    assert [event.WhichOneof("body") for event in events(effects)] == ["ready"]


def test_pages_of_a_running_step_are_quarantined_until_it_ends() -> None:
    core = decode_core()
    hand_off(core)
    core.next_batch(0.0)
    core.on_command(abort_command(DECODE), 0.0)
    assert core.pool.counts().quarantined == 2
    assert core.on_batch_done(StepResult(tokens=((8,),)), 0.0) == []
    check_nothing_is_left(core)


def test_a_failed_step_fails_the_rows_to_blame_and_runs_the_others_again() -> None:
    core = decode_core()
    hand_off(core, "first")
    hand_off(core, "second")
    batch, _ = core.next_batch(0.0)
    assert batch is not None
    assert failure(core.on_batch_failed({0})).code == pb.FAILURE_CODE_INTERNAL
    again, _ = core.next_batch(0.0)
    assert again is not None
    assert again.rows == batch.rows[1:]
    assert [row.request_id for row in again.rows] == ["second"]


@pytest.mark.parametrize("item", [opening(), seal(), Closed(id=handoff_id())])
def test_messages_of_strangers_change_nothing(item: Message) -> None:
    core = decode_core()
    assert core.on_message(b"x" * 16, item, 0.0) == []
    assert core.state().dropped_messages == 1


def test_a_worker_that_was_not_told_to_come_is_refused() -> None:
    core = decode_core()
    (refusal,) = messages(core.on_message(PREFILL, opening(), 0.0))
    assert refusal == Refused(id=handoff_id().reply(), reason=RefuseReason.UNKNOWN_TICKET)


@pytest.mark.parametrize(
    "item",
    [
        Committed(id=handoff_id()),
        seal(),
        frame(Grant(id=handoff_id(), slot=99, slot_generation=0), 0),
    ],
)
def test_messages_that_do_not_fit_are_dropped(item: Message) -> None:
    core = decode_core()
    core.on_command(attach_command(PROMPT), 0.0)
    assert core.on_message(PREFILL, item, 0.0) == []
    assert core.state().dropped_messages == 1


def test_a_first_token_outside_the_vocabulary_is_not_believed() -> None:
    core = decode_core()
    begin(core)
    effects = core.on_message(PREFILL, seal(first_token=100), 0.0)
    assert failure(effects).code == pb.FAILURE_CODE_INTEGRITY
    assert messages(effects) == [Refused(id=handoff_id().reply(), reason=RefuseReason.INTEGRITY)]


@pytest.mark.parametrize("params", [sampling(max_tokens=1), sampling(stop_token_ids=[7])])
def test_a_seal_of_what_had_ended_is_not_believed(params: pb.SamplingParams) -> None:
    core = decode_core()
    core.on_command(attach_command(PROMPT, params=params), 0.0)
    core.on_message(PREFILL, opening(), 0.0)
    assert failure(core.on_message(PREFILL, seal(), 0.0)).code == pb.FAILURE_CODE_INTEGRITY


def test_a_lost_peer_frees_what_it_could_have_written() -> None:
    core = decode_core(num_slots=2)
    credit, _ = grants(begin(core))
    core.place(PREFILL, frame(credit, 0), LAYOUT.page_bytes)
    assert failure(core.on_peer_lost(PREFILL, 0.0)).code == pb.FAILURE_CODE_PEER_LOST
    assert core.on_peer_lost(PREFILL, 0.0) == []
    core.on_command(abort_command(DECODE), 0.0)  # or the Reservation is held for another attempt
    check_nothing_is_left(core)


def test_a_lost_peer_does_not_concern_what_is_here() -> None:
    core = decode_core()
    hand_off(core)
    assert core.on_peer_lost(PREFILL, 0.0) == []
    batch, _ = core.next_batch(0.0)
    assert batch is not None


def test_a_lost_router_takes_its_requests_with_it() -> None:
    core = decode_core()
    hand_off(core, "first")
    other = attach_command(PROMPT, request_id="other")
    other.route.sender = b"s" * 16
    core.on_command(other, 0.0)
    assert core.on_session_lost(ROUTER) == []
    assert core.next_batch(0.0) == (None, [])
    assert grants(core.on_message(PREFILL, opening("other"), 0.0))


def test_state_counts_what_there_is() -> None:
    core = decode_core(max_batch_size=1)
    for name in ("first", "second"):
        hand_off(core, name)
    begin(core, "third")
    state = core.state()
    assert (state.running, state.queued, state.handoffs) == (1, 1, 1)
    assert (state.pages.owned, state.pages.free, state.pages.total) == (4, 12, 16)


def test_a_pause_of_this_process_costs_no_connection() -> None:
    core = decode_core(num_slots=1)
    begin(core)
    core.on_command(abort_command(DECODE), 0.0)
    core.tick(0.0)
    assert core.tick(3600.0) == []
    assert pass_time(core, 3600.25, 3604.0) == []
    assert Disconnect(peer=PREFILL) in pass_time(core, 3604.25, 3606.5)


def test_a_sender_that_never_closes_loses_its_connection_and_not_the_slots() -> None:
    """A stopped prefill worker must not keep credit from the others for ever."""
    core = decode_core(num_slots=1)
    begin(core)
    core.on_command(abort_command(DECODE), 0.0)
    assert pass_time(core, 10.0, 15.0) == []
    assert core.slots.num_free == 0
    assert core.tick(15.1) == [Disconnect(peer=PREFILL)]
    assert core.slots.num_free == 0  # until the connection is really gone
    core.on_peer_lost(PREFILL, 0.0)
    assert core.tick(100.0) == []
    check_nothing_is_left(core)


@pytest.mark.parametrize(("max_tokens", "first_token"), [(1, 7), (3, 9)])
def test_a_seal_with_a_token_that_ends_the_request_is_refused(
    max_tokens: int, first_token: int
) -> None:
    core = decode_core()
    params = sampling(max_tokens=max_tokens, stop_token_ids=[9])
    core.on_command(attach_command(PROMPT, params=params), 0.0)
    credit = grants(core.on_message(PREFILL, opening(), 0.0))
    for seq in range(2):
        land(core, frame(credit[seq], seq))
        core.on_scattered(frame(credit[seq], seq), True, 0.0)
    effects = core.on_message(PREFILL, seal(first_token=first_token), 0.0)
    assert failure(effects).code == pb.FAILURE_CODE_INTEGRITY


def test_a_hand_off_whose_last_frame_is_here_outlives_its_sender() -> None:
    core = decode_core()
    credit = grants(begin(core))
    for seq in range(2):
        land(core, frame(credit[seq], seq))
    core.on_message(PREFILL, seal(), 0.0)
    assert events(core.on_peer_lost(PREFILL, 0.0)) == []
    core.on_scattered(frame(credit[0], 0), True, 0.0)
    (event,) = events(core.on_scattered(frame(credit[1], 1), True, 0.0))
    assert event.HasField("ready")


def test_only_the_router_that_sent_a_request_can_abort_it() -> None:
    core = decode_core()
    begin(core)
    foreign = abort_command(DECODE)
    foreign.route.sender = b"x" * 16
    assert core.on_command(foreign, 0.0) == []
    assert not core.is_idle


def test_a_frame_larger_than_a_slot_is_refused_before_it_lands() -> None:
    core = decode_core()
    (credit, *_) = grants(begin(core))
    place, effects = core.place(PREFILL, frame(credit, 0), (1 << 20) + 1)
    assert place is None
    assert Refused(id=handoff_id().reply(), reason=RefuseReason.LAYOUT) in messages(effects)


def test_the_tokens_after_the_one_that_ends_a_sequence_are_dropped() -> None:
    core = decode_core()
    hand_off(core)
    core.next_batch(0.0)
    (last,) = events(core.on_batch_done(StepResult(tokens=((8, 9, 10),)), 0.0))
    assert list(last.tokens.token_ids) == [7, 8, 9]
    assert last.tokens.finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize("opaque", [b"\xff", b"\x0d"])
def test_logprobs_in_a_seal_that_cannot_be_read_are_not_believed(opaque: bytes) -> None:
    core = decode_core()
    params = pb.SamplingParams(max_tokens=3, top_p=1.0, num_logprobs=1)
    core.on_command(attach_command(PROMPT, params=params), 0.0)
    core.on_message(PREFILL, opening(), 0.0)
    effects = core.on_message(PREFILL, replace(seal(), first_logprobs=(opaque,)), 0.0)
    assert failure(effects).code == pb.FAILURE_CODE_INTEGRITY


def test_a_sender_that_waits_is_told_once_a_second() -> None:
    core = decode_core(num_pages=2)
    begin(core)
    begin(core, "waiting")
    renewals = [Renew(id=handoff_id(name).reply()) for name in ("waiting", "request")]
    assert messages(core.tick(1.0)) == renewals
    assert core.tick(1.75) == []
    assert messages(core.tick(2.0)) == renewals


def test_a_complete_handoff_is_not_renewed() -> None:
    core = decode_core()
    hand_off(core)
    assert core.tick(10.0) == []


@pytest.mark.parametrize("is_aborted", [False, True])
def test_what_a_lost_sender_has_sent_need_not_be_sent_again(is_aborted: bool) -> None:
    core = decode_core(hasher=HASHER)
    credit = grants(begin(core))
    land(core, frame(credit[0], 0))
    core.on_scattered(frame(credit[0], 0), True, 0.0)
    if is_aborted:  # the router may know of the loss first
        core.on_command(abort_command(DECODE), 0.0)
    core.on_peer_lost(PREFILL, 0.0)
    core.on_command(abort_command(DECODE), 0.0)
    check_nothing_is_left(core)
    (accepted, *_) = messages(begin(core, "again"))
    assert isinstance(accepted, Accepted)
    assert accepted.num_hit_pages == 1


@pytest.mark.parametrize("is_aborted", [False, True])
@pytest.mark.parametrize("is_complete", [False, True])
def test_what_is_not_verified_when_a_handoff_ends_is_not_kept(
    is_complete: bool, is_aborted: bool
) -> None:
    """The second frame is half in its page, or all of it but not checked."""
    core = decode_core(hasher=HASHER)
    credit = grants(begin(core, prompt=LONG_PROMPT))
    first, second = (replace(frame(credit[seq], seq), prefix_hash=LONG_HASH) for seq in range(2))
    land(core, first)
    core.on_scattered(first, True, 0.0)
    core.place(PREFILL, second, LAYOUT.page_bytes)
    if is_complete:
        core.on_message(PREFILL, second, 0.0)
    if is_aborted:
        core.on_command(abort_command(DECODE), 0.0)
    core.on_peer_lost(PREFILL, 0.0)
    if is_complete:
        core.on_scattered(second, False, 0.0)
    core.on_command(abort_command(DECODE), 0.0)
    check_nothing_is_left(core)
    (accepted, *_) = messages(begin(core, "again", prompt=LONG_PROMPT))
    assert isinstance(accepted, Accepted)
    assert accepted.num_hit_pages == 1


def test_what_failed_its_checks_is_not_kept() -> None:
    core = decode_core(hasher=HASHER)
    credit = grants(begin(core))
    for seq, is_sound in ((0, True), (1, False)):
        land(core, frame(credit[seq], seq))
        core.on_scattered(frame(credit[seq], seq), is_sound, 0.0)
    (accepted, *_) = messages(begin(core, "again"))
    assert isinstance(accepted, Accepted)
    assert accepted.num_hit_pages == 0


def test_a_retry_goes_on_behind_what_was_told() -> None:
    """The last three of the token ids are output; the Seal brings the fourth."""
    core = decode_core()
    command = attach_command(PROMPT, params=sampling(max_tokens=5))
    command.attach.num_output_tokens = 3
    core.on_command(command, 0.0)
    credit = grants(core.on_message(PREFILL, opening(), 0.0))
    assert core.pool.counts().total - core.pool.num_available == 2  # for 21 tokens
    for seq in range(2):
        land(core, frame(credit[seq], seq))
        core.on_scattered(frame(credit[seq], seq), True, 0.0)
    core.on_message(PREFILL, seal(), 0.0)
    batch, _ = core.next_batch(0.0)
    assert batch is not None
    (row,) = batch.rows
    assert (row.output_position, row.start) == (4, 20)
    (told,) = [event.tokens for event in events(core.on_batch_done(step_result(batch), 0.0))]
    assert (told.position, list(told.token_ids)) == (3, [7, 7])
    assert told.finish_reason == pb.FINISH_REASON_LENGTH
    check_nothing_is_left(core)


def test_what_is_complete_needs_no_sender_any_more() -> None:
    """Whose router or connection may be lost while the last frame is brought into pages."""
    core = decode_core()
    credit = grants(begin(core))
    for seq in range(2):
        land(core, frame(credit[seq], seq))
    core.on_message(PREFILL, seal(), 0.0)
    core.on_scattered(frame(credit[0], 0), True, 0.0)
    assert events(core.on_message(PREFILL, Closed(id=handoff_id()), 0.0)) == []
    effects = core.on_scattered(frame(credit[1], 1), True, 0.0)
    assert [event.WhichOneof("body") for event in events(effects)] == ["ready"]


def test_a_sender_that_gives_up_is_a_loss() -> None:
    """The router may have lost it, and wait for this worker."""
    core = decode_core()
    begin(core)
    code = failure(core.on_message(PREFILL, Closed(id=handoff_id()), 0.0)).code
    assert code == pb.FAILURE_CODE_PEER_LOST
    check_nothing_is_left(core)
