"""The two ends of a hand-off, joined: in whatever order, it succeeds or leaves nothing."""

from dataclasses import replace
from typing import Any

import pytest
from handoff_pair import (
    DECODE,
    LAYOUT,
    PREFILL,
    TOKEN,
    HandoffPair,
    abort_command,
    attach_command,
    decode_core,
    prefill_command,
    prefill_core,
    sampling,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.kv_transfer.messages import Closed, Frame, Open, Refused, RefuseReason
from pagewire.proto import worker_pb2 as pb

MAX_STEPS = 60
PROMPT = list(range(40))  # 3 pages, in 2 chunks
SLOT_SIZES = [LAYOUT.layer_bytes, LAYOUT.page_bytes, 2 * LAYOUT.page_bytes]

Choices = st.lists(st.integers(0, 6), max_size=MAX_STEPS)


def started(slot_bytes: int = LAYOUT.page_bytes, num_slots: int = 3) -> HandoffPair:
    """Both workers have their commands; nothing has happened."""
    pair = HandoffPair(prefill_core(slot_bytes=slot_bytes), decode_core(num_slots=num_slots))
    pair.carry_out(pair.decode.on_command(attach_command(PROMPT), 0.0))
    pair.carry_out(pair.prefill.on_command(prefill_command(PROMPT), 0.0))
    return pair


def play(pair: HandoffPair, choices: list[int]) -> None:
    """Take steps in an order that hypothesis chose."""
    for choice in choices:
        steps = pair.steps()
        steps[choice % len(steps)]()
        pair.prefill.check_integrity()
        pair.decode.check_integrity()


@settings(max_examples=150, deadline=None)
@given(choices=Choices, slot_bytes=st.sampled_from(SLOT_SIZES), num_slots=st.integers(1, 5))
def test_every_order_of_steps_commits(choices: list[int], slot_bytes: int, num_slots: int) -> None:
    pair = started(slot_bytes, num_slots)
    play(pair, choices)
    pair.run()
    assert sorted(str(name) for name in pair.event_names()) == sorted(
        ["attached", "first_token", "sealed", "ready", "tokens", "tokens"]
    )
    tokens = [event.tokens for event in pair.events if event.HasField("tokens")]
    assert [(item.position, list(item.token_ids)) for item in tokens] == [
        (0, [TOKEN, TOKEN]),
        (2, [TOKEN]),
    ]
    assert tokens[-1].finish_reason == pb.FINISH_REASON_LENGTH
    pair.check_nothing_is_left()


@settings(max_examples=250, deadline=None)
@given(
    before=Choices,
    between=Choices,
    first=st.sampled_from([PREFILL, DECODE]),
    slot_bytes=st.sampled_from(SLOT_SIZES),
)
def test_aborts_at_any_step_in_either_order_leave_nothing(
    before: list[int], between: list[int], first: bytes, slot_bytes: int
) -> None:
    pair = started(slot_bytes)
    play(pair, before)
    for index, end in enumerate(sorted((PREFILL, DECODE), key=lambda end: end != first)):
        core = pair.prefill if end == PREFILL else pair.decode
        pair.carry_out(core.on_command(abort_command(end), 0.0))
        play(pair, [] if index else between)
    pair.run()
    pair.check_nothing_is_left()


@settings(max_examples=150, deadline=None)
@given(before=Choices, first=st.sampled_from([PREFILL, DECODE]))
def test_a_lost_connection_at_any_step_leaves_nothing(before: list[int], first: bytes) -> None:
    pair = started()
    play(pair, before)
    pair.lose_connection(first)
    # The router tells the end that may not know of the hand-off yet, as it does after a failure.
    pair.carry_out(pair.prefill.on_command(abort_command(PREFILL), 0.0))
    pair.carry_out(pair.decode.on_command(abort_command(DECODE), 0.0))
    pair.run()
    pair.check_nothing_is_left()


@settings(max_examples=150, deadline=None)
@given(before=Choices, first=st.sampled_from([PREFILL, DECODE]))
def test_a_connection_without_a_handoff_may_end_unnoticed(before: list[int], first: bytes) -> None:
    pair = started()
    play(pair, before)
    if not pair.prefill.has_handoff(DECODE):
        pair.lose_connection(first)
    pair.run()
    assert not pair.failures()
    pair.check_nothing_is_left()


def test_a_handoff_is_under_way_from_its_first_chunk_until_it_is_committed() -> None:
    pair = started()
    assert not pair.prefill.has_handoff(DECODE)
    pair.step_prefill()
    assert pair.prefill.has_handoff(DECODE) and not pair.prefill.has_handoff(b"x" * 16)
    pair.run()
    assert not pair.prefill.has_handoff(DECODE)


@settings(max_examples=150, deadline=None)
@given(choices=Choices, repeated=st.sets(st.integers(0, 40)))
def test_repeated_messages_change_nothing(choices: list[int], repeated: set[int]) -> None:
    pair = started()
    for index, choice in enumerate(choices):
        if index in repeated and pair.to_decode:
            pair.to_decode.append(pair.to_decode[-1])
        if index in repeated and pair.to_prefill:
            pair.to_prefill.append(pair.to_prefill[-1])
        play(pair, [choice])
    pair.run()
    assert not pair.failures()
    assert pair.event_names().count("ready") == 1
    pair.check_nothing_is_left()


@pytest.mark.parametrize("seq", range(3))
def test_a_frame_with_a_wrong_checksum_ends_the_handoff(seq: int) -> None:
    pair = started()
    pair.bad_frames = {seq}
    pair.run()
    assert set(pair.failures()) == {
        (PREFILL, pb.FAILURE_CODE_INTEGRITY),
        (DECODE, pb.FAILURE_CODE_INTEGRITY),
    }
    pair.abort()
    pair.check_nothing_is_left()


@pytest.mark.parametrize(
    ("change", "reason", "failures"),
    [
        (
            {"ticket": b"x" * 16},
            RefuseReason.UNKNOWN_TICKET,
            [(PREFILL, pb.FAILURE_CODE_PEER_LOST)],
        ),
        (
            {"layout": replace(LAYOUT, head_dim=2)},
            RefuseReason.LAYOUT,
            [(DECODE, pb.FAILURE_CODE_INTEGRITY), (PREFILL, pb.FAILURE_CODE_INVALID)],
        ),
        (
            {"prefix_hash": b"x" * 16},
            RefuseReason.PREFIX,
            [(DECODE, pb.FAILURE_CODE_INTEGRITY), (PREFILL, pb.FAILURE_CODE_INTEGRITY)],
        ),
    ],
)
def test_what_was_not_agreed_is_refused(
    change: dict[str, Any], reason: RefuseReason, failures: list[tuple[bytes, int]]
) -> None:
    pair = started()
    pair.step_prefill()
    (message,) = pair.to_decode
    assert isinstance(message, Open)
    pair.to_decode[0] = replace(message, **change)
    pair.deliver_to_decode()
    (refusal,) = pair.to_prefill
    assert isinstance(refusal, Refused) and refusal.reason is reason
    pair.run()
    assert pair.failures() == failures
    pair.abort()
    pair.check_nothing_is_left()


def test_a_ticket_works_once() -> None:
    pair = started()
    pair.step_prefill()
    opening = pair.to_decode[0]
    pair.run()
    pair.to_decode.append(opening)
    pair.deliver_to_decode()
    (refusal,) = pair.to_prefill
    assert isinstance(refusal, Refused) and refusal.reason is RefuseReason.UNKNOWN_TICKET


def recorded_frame() -> tuple[HandoffPair, Frame]:
    """A pair whose first hand-off is over, and a frame of it."""
    pair = started()
    frames: list[Frame] = []
    while not frames:
        for step in pair.steps():
            step()
        frames = [message for message in pair.to_decode if isinstance(message, Frame)]
    pair.run()
    return pair, frames[0]


def test_a_frame_of_a_handoff_that_is_over_is_discarded() -> None:
    pair, frame = recorded_frame()
    dropped = pair.decode.state().dropped_messages
    assert pair.decode.place(PREFILL, frame, LAYOUT.page_bytes) == (None, [])
    assert pair.decode.state().dropped_messages == dropped + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("slot_generation", 9), ("slot", 3), ("slot", 2**32 - 1)],
)
def test_a_slot_that_was_not_granted_is_not_written(field: str, value: int) -> None:
    pair, old = recorded_frame()
    pair.carry_out(pair.decode.on_command(attach_command(PROMPT, attempt=2), 0.0))
    pair.carry_out(pair.prefill.on_command(prefill_command(PROMPT, attempt=2), 0.0))
    pair.step_prefill()
    pair.deliver_to_decode()
    change: dict[str, Any] = {field: value}
    stale = replace(old, id=replace(old.id, attempt=2), **change)
    assert pair.decode.place(PREFILL, stale, LAYOUT.page_bytes) == (None, [])
    assert pair.decode.on_message(PREFILL, stale, 0.0) == []


def test_what_does_not_fit_the_layout_ends_the_handoff() -> None:
    pair = started()
    while not any(isinstance(message, Frame) for message in pair.to_decode):
        for step in pair.steps():
            step()
    frame = next(message for message in pair.to_decode if isinstance(message, Frame))
    slot, effects = pair.decode.place(PREFILL, frame, LAYOUT.page_bytes - 1)
    pair.carry_out(effects)
    assert slot is None
    pair.run()
    assert (DECODE, pb.FAILURE_CODE_INTEGRITY) in pair.failures()
    pair.abort()
    pair.check_nothing_is_left()


def test_closed_before_open_leaves_no_slot_behind() -> None:
    """Found by the simulator: a link without order let all slots of a worker leak."""
    pair = HandoffPair(prefill_core(), decode_core())
    one_token = sampling(max_tokens=1)
    pair.carry_out(pair.decode.on_command(attach_command(PROMPT, params=one_token), 0.0))
    pair.carry_out(pair.prefill.on_command(prefill_command(PROMPT, params=one_token), 0.0))
    while not any(isinstance(message, Closed) for message in pair.to_decode):
        pair.step_prefill()
    pair.to_decode.reverse()
    pair.run()
    assert pair.decode.slots.num_free == 0
    pair.carry_out(pair.decode.on_command(abort_command(DECODE), 0.0))
    pair.run()
    pair.check_nothing_is_left()
