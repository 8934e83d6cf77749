"""A Landing: whatever the parts and the pieces, each byte goes to its place and is checksummed."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.landing import CheckedLanding, Landing

Sizes = st.lists(st.integers(0, 40), max_size=6)


def make_parts(sizes: list[int]) -> list[bytearray]:
    return [bytearray(size) for size in sizes]


def views(parts: list[bytearray]) -> list[memoryview]:
    return [memoryview(part) for part in parts]


@given(sizes=Sizes, cuts=st.data())
def test_pieces_fill_the_parts_in_order(sizes: list[int], cuts: st.DataObject) -> None:
    parts = make_parts(sizes)
    landing = CheckedLanding(*views(parts))
    payload = bytes(number % 251 + 1 for number in range(sum(sizes)))
    assert landing.num_bytes == len(payload)
    rest = payload
    while not landing.is_full:
        piece = landing.next_piece(cuts.draw(st.integers(1, 50)))
        count = cuts.draw(st.integers(1, len(piece)))
        piece[:count], rest = rest[:count], rest[count:]
        landing.advance(count)
    assert b"".join(parts) == payload
    assert landing.checksum() == checksum(payload)


@given(sizes=Sizes, first=st.integers(0, 240))
def test_a_payload_is_written_in_any_two_halves(sizes: list[int], first: int) -> None:
    parts = make_parts(sizes)
    landing = CheckedLanding(*views(parts))
    payload = memoryview(bytes(number % 251 + 1 for number in range(sum(sizes))))
    for half in (payload[:first], payload[first:]):
        landing.write(half)
    assert landing.is_full
    assert b"".join(parts) == payload
    assert landing.checksum() == checksum(payload)


@pytest.mark.parametrize("kind", [Landing, CheckedLanding])
@given(sizes=Sizes, limits=st.data())
def test_a_payload_is_received_from_a_socket(
    kind: type[Landing], sizes: list[int], limits: st.DataObject
) -> None:
    parts = make_parts(sizes)
    landing = kind(*views(parts))
    payload = bytes(number % 251 + 1 for number in range(sum(sizes)))
    sender, receiver = socket.socketpair()
    with sender, receiver:
        receiver.setblocking(False)
        sender.sendall(payload)
        while not landing.is_full:
            limit = limits.draw(st.integers(1, 50))
            assert 0 < landing.receive(receiver, limit) <= limit
    assert b"".join(parts) == payload
    if isinstance(landing, CheckedLanding):
        assert landing.checksum() == checksum(payload)


@given(sizes=Sizes, told=st.integers(0, 40))
def test_what_nobody_told_is_checksummed_in_the_end(sizes: list[int], told: int) -> None:
    parts = [bytearray(range(size)) for size in sizes]
    landing = CheckedLanding(*views(parts))
    if sizes and sizes[0]:
        landing.advance(min(told, sizes[0]))
    assert landing.checksum() == checksum(b"".join(parts))
    assert landing.is_full


def test_a_landing_in_one_part_is_whole_until_something_has_landed() -> None:
    memory = memoryview(bytearray(8)).cast("B", (2, 4))
    landing = Landing(memoryview(b""), memory)
    assert landing.whole is not None and landing.whole.nbytes == 8
    landing.advance(1)
    assert landing.whole is None
    assert Landing(*views(make_parts([4, 4]))).whole is None
    assert Landing().is_full


def test_nothing_lands_behind_the_end() -> None:
    landing = Landing(memoryview(bytearray(3)))
    with pytest.raises(IndexError):
        landing.write(memoryview(b"four"))
