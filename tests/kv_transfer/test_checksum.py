"""Checksums: independent of how the bytes are cut; digests: dependent on the order."""

from itertools import accumulate

from hypothesis import assume, given
from hypothesis import strategies as st

from pagewire.kv_transfer.checksum import EMPTY_DIGEST, checksum, digest_of, extend_digest


@given(st.lists(st.binary()))
def test_cuts_do_not_matter(parts: list[bytes]) -> None:
    assert checksum(*parts) == checksum(b"".join(parts))
    assert 0 <= checksum(*parts) < 2**32


@given(st.binary(min_size=1), st.data())
def test_a_flipped_bit_is_noticed(data: bytes, draw: st.DataObject) -> None:
    flipped = bytearray(data)
    flipped[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    assert checksum(memoryview(flipped)) != checksum(data)


def test_a_frame_with_checksum_0_is_noticed_after_any_other() -> None:
    """A chained CRC-32 stays at 0xFFFFFFFF when a checksum of 0 follows."""
    for checksums in ([2**32 - 1], [2**32 - 1, 0], [0], [0, 0]):
        assert digest_of([*checksums, 0]) != digest_of(checksums)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2), st.data())
def test_order_and_number_of_frames_matter(checksums: list[int], draw: st.DataObject) -> None:
    digests = list(accumulate(checksums, extend_digest, initial=EMPTY_DIGEST))
    first = draw.draw(st.integers(0, len(checksums) - 2))
    assume(checksums[first] != checksums[first + 1])
    swapped = list(checksums)
    swapped[first], swapped[first + 1] = swapped[first + 1], swapped[first]
    assert list(accumulate(swapped, extend_digest, initial=EMPTY_DIGEST))[-1] != digests[-1]
    assert extend_digest(digests[-1], 0) != digests[-1]
    assert all(0 <= digest < 2**32 for digest in digests)
