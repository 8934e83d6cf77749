"""The prefix of every message: what is encoded is decoded, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.kv_transfer.framing import (
    MAX_PAYLOAD_BYTES,
    PREFIX_BYTES,
    Decoder,
    Encoder,
    FramingError,
    Kind,
    Prefix,
)
from pagewire.kv_transfer.messages import MAX_HEADER_BYTES

messages = st.tuples(
    st.sampled_from(Kind), st.binary(max_size=50), st.integers(0, MAX_PAYLOAD_BYTES)
)


@given(st.lists(messages, max_size=5))
def test_round_trip(sent: list[tuple[Kind, bytes, int]]) -> None:
    encoder, decoder = Encoder(), Decoder()
    for kind, header, payload_bytes in sent:
        encoded = encoder.encode(kind, header, payload_bytes)
        prefix = decoder.decode(encoded[:PREFIX_BYTES])
        prefix.require_sound(encoded[PREFIX_BYTES:])
        found = (prefix.kind, prefix.header_bytes, prefix.payload_bytes)
        assert found == (kind, len(header), payload_bytes)


@given(st.binary(min_size=PREFIX_BYTES, max_size=PREFIX_BYTES))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(FramingError):
        Decoder().decode(data)


@given(messages, st.data())
def test_every_flipped_bit_is_noticed(
    message: tuple[Kind, bytes, int], draw: st.DataObject
) -> None:
    encoded = bytearray(Encoder().encode(*message))
    encoded[draw.draw(st.integers(0, len(encoded) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    with pytest.raises(FramingError):
        Decoder().decode(encoded[:PREFIX_BYTES]).require_sound(bytes(encoded[PREFIX_BYTES:]))


@pytest.mark.parametrize("order", [(0, 0), (1,), (0, 2)], ids=["repeated", "first lost", "lost"])
def test_a_message_out_of_its_turn_is_noticed(order: tuple[int, ...]) -> None:
    encoder, decoder = Encoder(), Decoder()
    sent = [encoder.encode(Kind.FREED) for _ in range(3)]
    with pytest.raises(FramingError, match="lost or repeated"):
        for index in order:
            decoder.decode(sent[index])


def test_limits() -> None:
    with pytest.raises(FramingError, match="header"):
        Prefix(kind=Kind.MESSAGE, header_bytes=MAX_HEADER_BYTES + 1)
    with pytest.raises(FramingError, match="payload"):
        Prefix(kind=Kind.MESSAGE, payload_bytes=MAX_PAYLOAD_BYTES + 1)
