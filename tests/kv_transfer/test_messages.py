"""Hand-off messages: what is encoded is decoded, and anything else is a MessageError."""

from dataclasses import fields
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.kv_transfer.layout import DTYPE_BYTES, PAGE_SIZES, KVLayout
from pagewire.kv_transfer.messages import (
    ID_BYTES,
    MAX_HEADER_BYTES,
    MAX_ITEMS,
    Accepted,
    Closed,
    Committed,
    Frame,
    FrameAck,
    Grant,
    HandoffId,
    Message,
    MessageError,
    Open,
    Refused,
    Seal,
    decode,
    encode,
)

KINDS: tuple[type[Message], ...] = (
    Open,
    Grant,
    Frame,
    FrameAck,
    Seal,
    Committed,
    Refused,
    Closed,
    Accepted,
)

ids = st.builds(
    HandoffId,
    request_id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64),
    attempt=st.integers(0, 2**32 - 1),
    sender=st.binary(min_size=ID_BYTES, max_size=ID_BYTES),
    receiver=st.binary(min_size=ID_BYTES, max_size=ID_BYTES),
)


layouts = st.builds(
    KVLayout,
    page_size=st.sampled_from(PAGE_SIZES),
    num_layers=st.integers(1, 200),
    num_kv_heads=st.integers(1, 200),
    head_dim=st.integers(1, 512),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
)


def _values(metadata: Any) -> st.SearchStrategy[object]:
    if "items" in metadata:
        return st.lists(_values(metadata["items"]), max_size=MAX_ITEMS // 2).map(tuple)
    if "limit" in metadata:
        return st.integers(0, metadata["limit"] - 1)
    if "length" in metadata:
        return st.binary(min_size=metadata["length"], max_size=metadata["length"])
    if "max_length" in metadata:
        return st.binary(max_size=metadata["max_length"])
    if "layout" in metadata:
        return layouts
    return st.sampled_from(metadata["enum"])


def _messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    values = {item.name: _values(item.metadata) for item in fields(kind) if item.name != "id"}
    return st.builds(kind, id=ids, **values)


messages = st.one_of([_messages(kind) for kind in KINDS])

msgpack_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=80)
    | st.binary(max_size=80),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=12,
)


def _decodes(data: bytes) -> Message | None:
    """The message in `data`; None for a MessageError, and any other error fails the test."""
    try:
        return decode(data)
    except MessageError:
        return None


@given(messages)
def test_round_trip(message: Message) -> None:
    encoded = encode(message)
    assert len(encoded) <= MAX_HEADER_BYTES
    assert decode(encoded) == message
    assert decode(memoryview(encoded)) == message


@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    _decodes(data)


@given(st.lists(msgpack_values, max_size=16))
def test_arbitrary_arrays(body: list[object]) -> None:
    message = _decodes(msgpack.packb(body))
    assert message is None or encode(message) == msgpack.packb(body)


@given(messages, st.data())
def test_a_field_of_another_type_or_range(message: Message, data: st.DataObject) -> None:
    body = msgpack.unpackb(encode(message))
    index = data.draw(st.integers(0, len(body) - 1))
    body[index] = data.draw(msgpack_values)
    changed = _decodes(msgpack.packb(body))
    assert changed is None or encode(changed) == msgpack.packb(body)


@given(messages, st.data())
def test_truncated_or_prolonged(message: Message, data: st.DataObject) -> None:
    encoded = encode(message)
    assert _decodes(encoded[: data.draw(st.integers(0, len(encoded) - 1))]) is None
    assert _decodes(encoded + data.draw(st.binary(min_size=1, max_size=20))) is None


@pytest.mark.parametrize(
    ("index", "value", "sentence"),
    [
        (0, 24, "layout cannot be: page_size is 24"),
        (1, 0, "num_layers is 0"),
        (1, True, "layout is not page_size, num_layers, num_kv_heads, head_dim, dtype"),
        (4, "fp8", "dtype is 'fp8'"),
        (4, 1, "layout is not page_size"),
    ],
)
@given(message=_messages(Open))
def test_a_layout_that_cannot_be(
    index: int, value: object, sentence: str, message: Message
) -> None:
    body = msgpack.unpackb(encode(message))
    (layout,) = (item for item in body if isinstance(item, list))
    layout[index] = value
    with pytest.raises(MessageError, match=sentence):
        decode(msgpack.packb(body))


def test_over_the_limit() -> None:
    with pytest.raises(MessageError, match="limit"):
        decode(bytes(MAX_HEADER_BYTES + 1))


def test_deep_nesting() -> None:
    assert _decodes(b"\x91" * MAX_HEADER_BYTES) is None


@given(ids)
def test_reply_names_the_same_hand_off(identity: HandoffId) -> None:
    assert identity.reply().reply() == identity
    assert identity.reply().sender == identity.receiver
    assert encode(Closed(id=identity.reply())) != encode(Closed(id=identity)) or (
        identity.sender == identity.receiver
    )
