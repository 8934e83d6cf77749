"""docs/PROTOCOL.md says what the code does: messages, timers and every (state, event) pair."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.receiver import Receiver, ReceiverState
from pagewire.kv_transfer.checksum import digest_of
from pagewire.kv_transfer.framing import Kind
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import (
    Frame,
    Grant,
    HandoffId,
    Message,
    Open,
    RefuseReason,
    Seal,
)
from pagewire.kv_transfer.socket_transport import CONNECT_TIMEOUT_S
from pagewire.prefill_worker.core import PrefillCore
from pagewire.prefill_worker.sender import Sender, SenderState

DOCUMENT = (Path(__file__).parents[2] / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
LAYOUT = KVLayout(page_size=16, num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32")
NUM_TOKENS = 16  # one page, one frame
CHECKSUM = 7
ID = HandoffId(request_id="request", attempt=1, sender=b"p" * 16, receiver=b"d" * 16)
TICKET, PREFIX = b"t" * 16, b"h" * 16
OPEN = Open(
    id=ID,
    ticket=TICKET,
    num_prompt_tokens=NUM_TOKENS,
    layout=LAYOUT,
    prefix_hash=PREFIX,
    age_ms=0,
)
GRANT = Grant(id=ID.reply(), slot=0, slot_generation=1)
FRAME = Frame(
    id=ID,
    seq=0,
    slot=0,
    slot_generation=1,
    first_page=0,
    num_pages=1,
    first_layer=0,
    num_layers=1,
    layout_digest=LAYOUT.digest(),
    prefix_hash=PREFIX,
    checksum=CHECKSUM,
)
SEAL = Seal(id=ID, num_frames=1, digest=digest_of([CHECKSUM]), first_tokens=(3,))
SEAL_OF_HITS = replace(SEAL, num_frames=0, digest=digest_of([]))
OTHER_LAYOUT = replace(OPEN, layout=replace(LAYOUT, num_layers=9))

Table = Mapping[str, Mapping[str, str]]  # row → column → cell
SenderEvent = Callable[[Sender], list[Message] | None]
ReceiverEvent = Callable[[Receiver], RefuseReason | None]


def table(heading: str) -> Table:
    """The first table below a heading of the document."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def finish(sender: Sender) -> list[Message]:
    return [*sender.on_computed(NUM_TOKENS, 0.0), *sender.finish((3,), 0.0)]


def reserve(receiver: Receiver, num_hits: int) -> None:
    receiver.on_reserved(num_hits)


SENDER_EVENTS: dict[str, SenderEvent] = {
    "opened": lambda sender: sender.open(0.0),
    "computed": lambda sender: sender.on_computed(NUM_TOKENS, 0.0),
    "layers computed": lambda sender: sender.on_layers_computed(LAYOUT.num_layers, 0.0),
    "Accepted": lambda sender: sender.on_accepted(0, 0.0),
    "Accepted, all cached": lambda sender: sender.on_accepted(1, 0.0),
    "Grant": lambda sender: sender.on_grant(GRANT, 0.0),
    "token 0": finish,
    "sent": lambda sender: sender.on_sent(0, CHECKSUM, 0.0),
    "not sent": lambda sender: sender.on_sent(0, None, 0.0),
    "FrameAck": lambda sender: sender.on_ack(0, 0.0),
    "Renew": lambda sender: sender.on_renew(0.0),
    "Committed": lambda sender: sender.on_committed(),
    "given up": lambda sender: sender.close(),
    "peer lost": lambda sender: sender.on_peer_lost(),
}
SENDER_SITUATIONS: dict[str, list[str]] = {
    "QUEUED": [],
    "STREAMING, no answer yet": ["opened"],
    "STREAMING, computed": ["opened", "token 0"],
    "STREAMING, accepted": ["opened", "Accepted"],
    "STREAMING, with credit": ["opened", "Accepted", "Grant"],
    "STREAMING, frame on its way": ["opened", "Accepted", "Grant", "token 0"],
    "SEALED": ["opened", "Accepted", "Grant", "token 0", "sent"],
    "DRAINING": ["opened", "Accepted", "Grant", "token 0", "given up"],
    "RELEASED": ["given up"],
}
RECEIVER_EVENTS: dict[str, ReceiverEvent] = {
    "Open": lambda receiver: receiver.on_open(OPEN),
    "Open, other ticket": lambda receiver: receiver.on_open(replace(OPEN, ticket=bytes(16))),
    "Open, other layout": lambda receiver: receiver.on_open(
        replace(OPEN, layout=replace(LAYOUT, num_layers=9))
    ),
    "Open, other prompt": lambda receiver: receiver.on_open(replace(OPEN, prefix_hash=bytes(16))),
    "reserved": lambda receiver: reserve(receiver, 0),
    "reserved, all cached": lambda receiver: reserve(receiver, 1),
    "Frame": lambda receiver: receiver.on_landing(FRAME),
    "payload": lambda receiver: receiver.on_landed(FRAME),
    "scattered": lambda receiver: receiver.on_scattered(FRAME),
    "Seal": lambda receiver: receiver.on_seal(SEAL),
    "Seal, no frames": lambda receiver: receiver.on_seal(SEAL_OF_HITS),
    "Seal, other digest": lambda receiver: receiver.on_seal(replace(SEAL, digest=1)),
    "given up": lambda receiver: receiver.close(),
}
RECEIVER_SITUATIONS: dict[str, list[str]] = {
    "EXPECTED": [],
    "WAITING": ["Open"],
    "RECEIVING": ["Open", "reserved"],
    "RECEIVING, all cached": ["Open", "reserved, all cached"],
    "RECEIVING, payload landing": ["Open", "reserved", "Frame"],
    "RECEIVING, frame in its slot": ["Open", "reserved", "Frame", "payload"],
    "RECEIVING, frame in pages": ["Open", "reserved", "Frame", "payload", "scattered"],
    "RECEIVING, sealed": ["Open", "reserved", "Frame", "payload", "Seal"],
    "READY": ["Open", "reserved", "Frame", "payload", "Seal", "scattered"],
    "CLOSED": ["given up"],
}


def sender_in(situation: str) -> Sender:
    sender = Sender(
        id=ID,
        ticket=TICKET,
        prefix_hash=PREFIX,
        num_prompt_tokens=NUM_TOKENS,
        layout=LAYOUT,
        slot_bytes=LAYOUT.page_bytes,
    )
    for event in SENDER_SITUATIONS[situation]:
        SENDER_EVENTS[event](sender)
    return sender


def receiver_in(situation: str) -> Receiver:
    receiver = Receiver(
        id=ID.reply(),
        ticket=TICKET,
        prefix_hash=PREFIX,
        num_prompt_tokens=NUM_TOKENS,
        layout=LAYOUT,
    )
    for event in RECEIVER_SITUATIONS[situation]:
        RECEIVER_EVENTS[event](receiver)
    return receiver


def cell(before: str, after: str, effects: Iterable[str]) -> str:
    """What the document writes: the new state where it is another, and what is sent."""
    words = [after.split(",")[0] if after != before else "", *effects]
    return " ".join(word for word in words if word) or "="


def sender_cell(situation: str, event: str) -> str:
    sender = sender_in(situation)
    before = sender.state.name
    messages = SENDER_EVENTS[event](sender) or []
    return cell(before, sender.state.name, (type(message).__name__ for message in messages))


def receiver_cell(situation: str, event: str) -> str:
    receiver = receiver_in(situation)
    before = receiver.state.name
    reason = RECEIVER_EVENTS[event](receiver)
    return cell(before, receiver.state.name, [] if reason is None else [f"Refused({reason})"])


@pytest.mark.parametrize(
    ("heading", "situations", "events", "code"),
    [
        ("The sender", SENDER_SITUATIONS, SENDER_EVENTS, sender_cell),
        ("The receiver", RECEIVER_SITUATIONS, RECEIVER_EVENTS, receiver_cell),
    ],
)
def test_every_pair_of_state_and_event(
    heading: str,
    situations: Mapping[str, list[str]],
    events: Iterable[str],
    code: Callable[[str, str], str],
) -> None:
    expected = {
        event: {situation: code(situation, event) for situation in situations} for event in events
    }
    assert table(heading) == expected


def test_the_situations_cover_every_state() -> None:
    assert {sender_in(name).state for name in SENDER_SITUATIONS} == set(SenderState)
    assert {receiver_in(name).state for name in RECEIVER_SITUATIONS} == set(ReceiverState)
    for name in SENDER_SITUATIONS:
        assert sender_in(name).state.name == name.split(",")[0]
    for name in RECEIVER_SITUATIONS:
        assert receiver_in(name).state.name == name.split(",")[0]


def test_every_message_with_its_fields() -> None:
    documented = {name: (row["code"], row["fields"]) for name, row in table("Messages").items()}
    assert documented == {
        kind.__name__: (
            str(kind.code),
            ", ".join(f"`{item.name}`" for item in fields(kind) if item.name != "id").strip("`")
            or "none",
        )
        for kind in get_args(Message)
    }


def test_every_reason_to_refuse() -> None:
    assert set(table("Reasons to refuse")) == set(RefuseReason)


def test_every_kind_of_prefix() -> None:
    documented = {name: row["number"] for name, row in table("Connections").items()}
    assert documented == {kind.name: str(int(kind)) for kind in Kind}


def test_every_timer() -> None:
    documented = {name: row["seconds"] for name, row in table("Timers").items()}
    prefill = inspect.signature(PrefillCore).parameters
    decode = inspect.signature(DecodeCore).parameters
    values = {
        "connect": CONNECT_TIMEOUT_S,
        "answer_s": prefill["answer_s"].default,
        "send_s": prefill["send_s"].default,
        "lease_s": prefill["lease_s"].default,
        "renew_s": decode["renew_s"].default,
        "closing_s": decode["closing_s"].default,
    }
    assert documented == {name: f"{value:g}" for name, value in values.items()}
    assert prefill["lease_s"].default == decode["lease_s"].default
