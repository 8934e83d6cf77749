"""The prefix of every message: what is encoded is decoded, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.kv_transfer.framing import (
    MAX_PAYLOAD_BYTES,
    PREFIX_BYTES,
    FramingError,
    Kind,
    Prefix,
)
from pagewire.kv_transfer.messages import MAX_HEADER_BYTES

prefixes = st.builds(
    Prefix,
    kind=st.sampled_from(Kind),
    header_bytes=st.integers(0, MAX_HEADER_BYTES),
    payload_bytes=st.integers(0, MAX_PAYLOAD_BYTES),
)


@given(prefixes)
def test_round_trip(prefix: Prefix) -> None:
    encoded = prefix.encode()
    assert len(encoded) == PREFIX_BYTES
    assert Prefix.decode(encoded) == prefix


@given(st.binary(min_size=PREFIX_BYTES, max_size=PREFIX_BYTES))
def test_arbitrary_bytes(data: bytes) -> None:
    try:
        prefix = Prefix.decode(data)
    except FramingError:
        return
    assert prefix.encode() == data


def test_limits() -> None:
    with pytest.raises(FramingError, match="header"):
        Prefix(kind=Kind.MESSAGE, header_bytes=MAX_HEADER_BYTES + 1)
    with pytest.raises(FramingError, match="payload"):
        Prefix(kind=Kind.MESSAGE, payload_bytes=MAX_PAYLOAD_BYTES + 1)
