"""The Receiver's table of states, and what makes it believe a hand-off."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from handoff_pair import DECODE, LAYOUT, PREFILL, TICKET
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.decode_worker.receiver import Receiver, ReceiverState
from pagewire.kv_transfer.checksum import EMPTY_DIGEST, extend_digest
from pagewire.kv_transfer.layout import plan_frames
from pagewire.kv_transfer.messages import Frame, HandoffId, Open, RefuseReason, Seal

NUM_TOKENS = 40  # 3 pages
PREFIX_HASH = b"h" * 16
ID = HandoffId(request_id="request", attempt=1, sender=PREFILL, receiver=DECODE)
OPEN = Open(
    id=ID,
    ticket=TICKET,
    num_prompt_tokens=NUM_TOKENS,
    layout=LAYOUT,
    prefix_hash=PREFIX_HASH,
    age_ms=0,
)


def expecting() -> Receiver:
    return Receiver(
        id=ID.reply(),
        ticket=TICKET,
        prefix_hash=PREFIX_HASH,
        num_prompt_tokens=NUM_TOKENS,
        layout=LAYOUT,
    )


def receiving() -> Receiver:
    receiver = expecting()
    assert receiver.on_open(OPEN) is None
    receiver.on_reserved()
    return receiver


def make_frames(slot_bytes: int = LAYOUT.page_bytes) -> list[Frame]:
    """All frames of the hand-off; the checksum of frame n is 100 + n."""
    parts = plan_frames(LAYOUT, 0, LAYOUT.num_pages(NUM_TOKENS), slot_bytes)
    return [
        Frame(
            id=ID,
            seq=seq,
            slot=0,
            slot_generation=0,
            first_page=part.first_page,
            num_pages=part.num_pages,
            first_layer=part.first_layer,
            num_layers=part.num_layers,
            layout_digest=LAYOUT.digest(),
            prefix_hash=PREFIX_HASH,
            checksum=100 + seq,
        )
        for seq, part in enumerate(parts)
    ]


def make_seal(frames: list[Frame]) -> Seal:
    digest = EMPTY_DIGEST
    for frame in frames:
        digest = extend_digest(digest, frame.checksum)
    return Seal(id=ID, num_frames=len(frames), digest=digest, first_tokens=(7,))


def receive(receiver: Receiver, frame: Frame) -> RefuseReason | None:
    receiver.on_landing(frame)
    receiver.on_landed(frame)
    return receiver.on_scattered(frame)


def seen(receiver: Receiver) -> tuple[ReceiverState, bool, bool]:
    return receiver.state, receiver.is_open, receiver.wants_credit


def test_open_and_reservation_lead_to_receiving() -> None:
    receiver = expecting()
    assert seen(receiver) == (ReceiverState.EXPECTED, False, False)
    assert receiver.on_open(OPEN) is None
    assert seen(receiver) == (ReceiverState.WAITING, True, False)
    receiver.on_reserved()
    assert seen(receiver) == (ReceiverState.RECEIVING, True, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ticket": b"x" * 16}, RefuseReason.UNKNOWN_TICKET),
        ({"layout": replace(LAYOUT, num_layers=3)}, RefuseReason.LAYOUT),
        ({"layout": replace(LAYOUT, num_kv_heads=2)}, RefuseReason.LAYOUT),
        ({"layout": replace(LAYOUT, head_dim=2)}, RefuseReason.LAYOUT),
        ({"prefix_hash": b"x" * 16}, RefuseReason.PREFIX),
        ({"num_prompt_tokens": NUM_TOKENS + 1}, RefuseReason.PREFIX),
    ],
)
def test_an_open_that_was_not_agreed_is_refused(
    change: dict[str, Any], reason: RefuseReason
) -> None:
    receiver = expecting()
    assert receiver.on_open(replace(OPEN, **change)) is reason
    assert receiver.state is ReceiverState.EXPECTED


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    slot_bytes=st.sampled_from([LAYOUT.layer_bytes, LAYOUT.page_bytes, 2 * LAYOUT.page_bytes]),
)
def test_ready_when_sealed_and_covered_in_any_order(data: st.DataObject, slot_bytes: int) -> None:
    frames = make_frames(slot_bytes)
    receiver = receiving()
    items: list[Frame | Seal] = [*frames, make_seal(frames)]
    for item in data.draw(st.permutations(items)):
        assert receiver.state is ReceiverState.RECEIVING
        fault = receiver.on_seal(item) if isinstance(item, Seal) else receive(receiver, item)
        assert fault is None
    assert receiver.state is ReceiverState.READY
    assert not receiver.is_open
    assert not receiver.wants_credit


def test_a_seal_waits_for_what_is_landing() -> None:
    frames = make_frames()
    receiver = receiving()
    for frame in frames:
        receiver.on_landing(frame)
    assert receiver.on_seal(make_seal(frames)) is None
    for frame in frames:
        assert receiver.needs_sender
        receiver.on_landed(frame)
    assert not receiver.needs_sender
    for frame in frames:
        assert receiver.state is ReceiverState.RECEIVING
        assert receiver.on_scattered(frame) is None
    assert receiver.state is ReceiverState.READY


def test_a_digest_that_does_not_match_is_a_fault() -> None:
    frames = make_frames()
    receiver = receiving()
    for frame in frames:
        receive(receiver, frame)
    seal = make_seal(list(reversed(frames)))
    assert receiver.on_seal(seal) is RefuseReason.INTEGRITY


def test_a_seal_that_leaves_pages_uncovered_is_a_fault() -> None:
    frames = make_frames()[:-1]
    receiver = receiving()
    for frame in frames:
        receive(receiver, frame)
    assert receiver.on_seal(make_seal(frames)) is RefuseReason.INTEGRITY


def test_frames_beyond_the_seal_are_a_fault() -> None:
    frames = make_frames()
    receiver = receiving()
    receive(receiver, replace(frames[0], seq=9))
    for frame in frames[1:]:
        receive(receiver, frame)
    assert receiver.on_seal(make_seal(frames)) is RefuseReason.INTEGRITY


def test_the_same_pages_twice_are_a_fault() -> None:
    first, *_ = make_frames()
    receiver = receiving()
    length = first.part.num_bytes(LAYOUT)
    assert receiver.agrees(first, length)
    receiver.on_landing(first)
    assert not receiver.agrees(replace(first, seq=1), length)


def test_a_repeated_frame_is_known() -> None:
    first, second, _ = make_frames()
    receiver = receiving()
    receiver.on_landing(first)
    assert receiver.is_repeated(first)
    receiver.on_landed(first)
    assert receiver.is_repeated(first)
    receiver.on_scattered(first)
    assert receiver.is_repeated(first)
    assert not receiver.is_repeated(second)


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({"layout_digest": b"x" * 16}, LAYOUT.page_bytes),
        ({"prefix_hash": b"x" * 16}, LAYOUT.page_bytes),
        ({"num_pages": 0}, 0),
        ({"num_layers": 0}, 0),
        ({"first_page": 3}, LAYOUT.page_bytes),
        ({"first_layer": 1}, LAYOUT.page_bytes),
        ({}, LAYOUT.page_bytes - 1),
    ],
)
def test_a_frame_that_cannot_be_is_not_believed(change: dict[str, Any], length: int) -> None:
    first, *_ = make_frames()
    assert receiving().agrees(first, LAYOUT.page_bytes)
    assert not receiving().agrees(replace(first, **change), length)


def test_a_frame_that_would_write_into_shared_pages_is_not_believed() -> None:
    first, second, _ = make_frames()
    receiver = expecting()
    receiver.on_open(OPEN)
    assert receiver.on_reserved(1) == 1
    assert not receiver.agrees(first, LAYOUT.page_bytes)
    assert receiver.agrees(second, LAYOUT.page_bytes)


@pytest.mark.parametrize(
    ("page_size", "hit_unit", "num_hits", "num_hit_pages"),
    [(16, 1, 2, 2), (32, 2, 2, 1), (64, 4, 0, 0)],
)
def test_the_sender_counts_in_its_own_pages(
    page_size: int, hit_unit: int, num_hits: int, num_hit_pages: int
) -> None:
    receiver = expecting()
    source = replace(LAYOUT, page_size=page_size)
    assert receiver.on_open(replace(OPEN, layout=source)) is None
    assert (receiver.source, receiver.hit_unit) == (source, hit_unit)
    assert receiver.on_reserved(num_hits) == num_hit_pages
    last = NUM_TOKENS // page_size  # which ends behind the prompt
    frame = replace(make_frames()[0], first_page=last, layout_digest=source.digest())
    assert receiver.agrees(frame, source.page_bytes)
    assert not receiver.agrees(replace(frame, first_page=last + 1), source.page_bytes)
    assert not receiver.agrees(
        replace(frame, layout_digest=replace(source, page_size=128).digest()), source.page_bytes
    )
    assert receiver.pages_of(frame) == range(last * page_size // LAYOUT.page_size, 3)


def test_a_second_seal_changes_nothing() -> None:
    frames = make_frames()
    receiver = receiving()
    assert receiver.on_seal(make_seal(frames)) is None
    assert receiver.on_seal(replace(make_seal(frames), num_frames=0)) is None
    assert receiver.seal == make_seal(frames)
    assert not receiver.wants_credit


@pytest.mark.parametrize("make", [expecting, receiving])
def test_close_is_final(make: Callable[[], Receiver]) -> None:
    receiver = make()
    receiver.close()
    receiver.close()
    assert receiver.state is ReceiverState.CLOSED
    assert not receiver.is_open
    assert receiver.on_seal(make_seal([])) is None
    assert receiver.state is ReceiverState.CLOSED
