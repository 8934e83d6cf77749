"""The Sender's table of states, its credit and its sense of a stall."""

from collections.abc import Callable

import pytest
from handoff_pair import DECODE, LAYOUT, PREFILL, TICKET

from pagewire.kv_transfer.checksum import EMPTY_DIGEST, extend_digest
from pagewire.kv_transfer.messages import Closed, Frame, Grant, HandoffId, Message, Open, Seal
from pagewire.prefill_worker.sender import Sender, SenderState

NUM_TOKENS = 40  # 3 pages


def make_sender(slot_bytes: int = LAYOUT.page_bytes) -> Sender:
    return Sender(
        id=HandoffId(request_id="request", attempt=1, sender=PREFILL, receiver=DECODE),
        ticket=TICKET,
        prefix_hash=b"h" * 16,
        num_prompt_tokens=NUM_TOKENS,
        layout=LAYOUT,
        slot_bytes=slot_bytes,
    )


def grant(sender: Sender, slot: int, generation: int = 0) -> Grant:
    return Grant(id=sender.id.reply(), slot=slot, slot_generation=generation)


def streaming() -> Sender:
    sender = make_sender()
    sender.open(0.0)
    sender.on_accepted(0, 0.0)
    return sender


def streaming_with_a_send_in_flight() -> Sender:
    sender = streaming()
    sender.on_computed(16, 0.0)
    assert len(sender.on_grant(grant(sender, 0), 0.0)) == 1
    return sender


def sealed() -> Sender:
    sender = streaming()
    sender.on_computed(NUM_TOKENS, 0.0)
    for slot in range(3):
        sender.on_grant(grant(sender, slot), 0.0)
    for seq in range(3):
        sender.on_sent(seq, 5, 0.0)
    assert len(sender.finish((7,), 0.0)) == 1
    return sender


def draining() -> Sender:
    sender = streaming_with_a_send_in_flight()
    sender.close()
    return sender


def released() -> Sender:
    sender = make_sender()
    sender.close()
    return sender


def close(sender: Sender) -> list[Message]:
    return sender.close()


def lose_peer(sender: Sender) -> list[Message]:
    sender.on_peer_lost()
    return []


def reopen(sender: Sender) -> list[Message]:
    return sender.open(0.0)


def commit(sender: Sender) -> list[Message]:
    sender.on_committed()
    return []


@pytest.mark.parametrize(
    ("make", "before", "event", "after", "sent"),
    [
        (make_sender, SenderState.QUEUED, reopen, SenderState.STREAMING, [Open]),
        (make_sender, SenderState.QUEUED, close, SenderState.RELEASED, []),
        (make_sender, SenderState.QUEUED, commit, SenderState.QUEUED, []),
        (streaming, SenderState.STREAMING, reopen, SenderState.STREAMING, []),
        (streaming, SenderState.STREAMING, close, SenderState.RELEASED, [Closed]),
        (streaming, SenderState.STREAMING, commit, SenderState.STREAMING, []),
        (
            streaming_with_a_send_in_flight,
            SenderState.STREAMING,
            close,
            SenderState.DRAINING,
            [],
        ),
        (sealed, SenderState.SEALED, commit, SenderState.RELEASED, []),
        (sealed, SenderState.SEALED, close, SenderState.RELEASED, [Closed]),
        (draining, SenderState.DRAINING, close, SenderState.DRAINING, []),
        (draining, SenderState.DRAINING, commit, SenderState.DRAINING, []),
        (released, SenderState.RELEASED, close, SenderState.RELEASED, []),
        (released, SenderState.RELEASED, reopen, SenderState.RELEASED, []),
        (streaming, SenderState.STREAMING, lose_peer, SenderState.RELEASED, []),
        (sealed, SenderState.SEALED, lose_peer, SenderState.RELEASED, []),
        (draining, SenderState.DRAINING, lose_peer, SenderState.RELEASED, []),
    ],
)
def test_table(
    make: Callable[[], Sender],
    before: SenderState,
    event: Callable[[Sender], list[Message]],
    after: SenderState,
    sent: list[type[Message]],
) -> None:
    sender = make()
    assert sender.state is before
    assert [type(message) for message in event(sender)] == sent
    assert sender.state is after


def test_open_says_what_was_agreed() -> None:
    (message,) = make_sender().open(0.0)
    assert isinstance(message, Open)
    assert (message.ticket, message.num_prompt_tokens) == (TICKET, NUM_TOKENS)
    assert (message.layout, message.prefix_hash) == (LAYOUT, b"h" * 16)


def test_the_last_send_ends_the_draining() -> None:
    sender = draining()
    assert [type(message) for message in sender.on_sent(0, 5, 0.0)] == [Closed]
    assert sender.state is SenderState.RELEASED
    assert not sender.is_open


def test_frames_wait_for_credit_and_credit_for_frames() -> None:
    sender = streaming()
    assert sender.on_computed(32, 0.0) == []
    (first,) = sender.on_grant(grant(sender, slot=4, generation=2), 0.0)
    assert isinstance(first, Frame)
    assert (first.seq, first.slot, first.slot_generation, first.first_page) == (0, 4, 2, 0)
    assert len(sender.on_grant(grant(sender, slot=5), 0.0)) == 1
    assert sender.on_grant(grant(sender, slot=6), 0.0) == []
    (third,) = sender.on_computed(NUM_TOKENS, 0.0)
    assert isinstance(third, Frame)
    assert (third.seq, third.slot, third.first_page) == (2, 6, 2)


def test_a_page_is_sent_once_it_is_complete() -> None:
    sender = streaming()
    sender.on_grant(grant(sender, 0), 0.0)
    assert sender.on_computed(15, 0.0) == []
    assert len(sender.on_computed(16, 0.0)) == 1


def test_repeated_credit_is_used_once() -> None:
    sender = streaming()
    sender.on_computed(NUM_TOKENS, 0.0)
    assert len(sender.on_grant(grant(sender, slot=0), 0.0)) == 1
    assert sender.on_grant(grant(sender, slot=0), 0.0) == []
    assert len(sender.on_grant(grant(sender, slot=0, generation=1), 0.0)) == 1


def test_a_page_larger_than_a_slot_goes_in_layers() -> None:
    sender = make_sender(slot_bytes=LAYOUT.layer_bytes)
    sender.open(0.0)
    sender.on_accepted(0, 0.0)
    sender.on_computed(16, 0.0)
    parts = [sender.on_grant(grant(sender, slot), 0.0)[0] for slot in range(2)]
    assert [(part.first_layer, part.num_layers) for part in parts if isinstance(part, Frame)] == [
        (0, 1),
        (1, 1),
    ]


def test_the_seal_covers_every_frame() -> None:
    sender = streaming()
    sender.on_computed(NUM_TOKENS, 0.0)
    for slot in range(3):
        sender.on_grant(grant(sender, slot), 0.0)
    assert sender.finish((7,), 0.0) == []
    assert sender.on_sent(2, 30, 0.0) == []
    assert sender.on_sent(0, 10, 0.0) == []
    (seal,) = sender.on_sent(1, 20, 0.0)
    digest = EMPTY_DIGEST
    for checksum in (10, 20, 30):
        digest = extend_digest(digest, checksum)
    assert seal == Seal(id=sender.id, num_frames=3, digest=digest, first_tokens=(7,))


def is_stalled(sender: Sender, now: float) -> bool:
    return sender.is_stalled(now, answer_s=5.0, send_s=30.0)


def test_a_peer_that_says_nothing_is_a_stall_from_the_first_message_on() -> None:
    sender = make_sender()
    assert not is_stalled(sender, 100.0)
    sender.open(10.0)
    assert not is_stalled(sender, 15.0)
    assert is_stalled(sender, 15.1)


def test_a_peer_that_waits_says_so() -> None:
    sender = make_sender()
    sender.open(0.0)
    sender.on_renew(4.0)
    assert not is_stalled(sender, 9.0)
    sender.on_accepted(0, 9.0)
    assert not is_stalled(sender, 14.0)
    sender.on_computed(16, 14.0)
    sender.on_renew(14.0)
    assert not is_stalled(sender, 19.0)
    assert is_stalled(sender, 19.1)


def test_a_peer_that_owes_an_answer_cannot_put_it_off() -> None:
    sender = streaming_with_a_send_in_flight()
    sender.on_sent(0, 5, 0.0)
    sender.on_renew(4.0)
    assert is_stalled(sender, 5.1)
    sender = sealed()
    sender.on_renew(4.0)
    assert is_stalled(sender, 5.1)


def test_a_frame_that_is_not_acknowledged_is_a_stall() -> None:
    sender = streaming()
    sender.on_computed(NUM_TOKENS, 0.0)
    sender.on_grant(grant(sender, 0), 10.0)
    sender.on_grant(grant(sender, 1), 10.0)
    sender.on_sent(0, 5, 11.0)
    sender.on_sent(1, 5, 12.0)
    assert not is_stalled(sender, 17.0)
    assert is_stalled(sender, 17.1)
    sender.on_ack(0, 14.0)
    sender.on_ack(0, 100.0)  # a repetition is no progress
    assert not is_stalled(sender, 19.0)
    assert is_stalled(sender, 19.1)
    sender.on_ack(1, 19.0)
    assert not is_stalled(sender, 24.0)


def test_a_slow_link_has_longer_than_a_silent_peer() -> None:
    sender = streaming_with_a_send_in_flight()
    assert not is_stalled(sender, 30.0)
    assert is_stalled(sender, 30.1)
    sender.close()
    assert sender.state is SenderState.DRAINING
    assert is_stalled(sender, 30.1)


def test_a_frame_that_was_not_sent_is_not_sealed() -> None:
    sender = streaming()
    sender.on_computed(NUM_TOKENS, 0.0)
    for slot in range(3):
        sender.on_grant(grant(sender, slot), 0.0)
    assert sender.finish((7,), 0.0) == []
    for seq, checksum in enumerate((5, None, 5)):
        assert sender.on_sent(seq, checksum, 0.0) == []
    assert sender.state is SenderState.STREAMING


def test_a_seal_that_is_not_committed_is_a_stall() -> None:
    sender = sealed()
    assert not is_stalled(sender, 5.0)
    assert is_stalled(sender, 5.1)
    sender.on_committed()
    assert not is_stalled(sender, 100.0)


def test_nothing_is_sent_or_sealed_before_the_peer_has_accepted() -> None:
    sender = make_sender()
    sender.open(0.0)
    sender.on_computed(NUM_TOKENS, 0.0)
    assert sender.on_grant(grant(sender, 0), 0.0) == []
    assert sender.finish((7,), 0.0) == []
    (frame,) = sender.on_accepted(2, 0.0)
    assert isinstance(frame, Frame) and (frame.first_page, frame.num_pages) == (2, 1)
    assert sender.on_accepted(0, 0.0) == []
    assert [type(message) for message in sender.on_sent(0, 5, 0.0)] == [Seal]


def test_a_prompt_that_the_peer_has_is_sealed_without_a_frame() -> None:
    sender = make_sender()
    sender.open(0.0)
    sender.on_computed(NUM_TOKENS, 0.0)
    sender.finish((7,), 0.0)
    (seal,) = sender.on_accepted(3, 0.0)
    assert isinstance(seal, Seal) and (seal.num_frames, seal.digest) == (0, EMPTY_DIGEST)
