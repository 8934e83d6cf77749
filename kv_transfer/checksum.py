"""The checksums of a frame, and the digest that a Seal carries over all of them.

All detect accidents: memory or a network that changed a byte, a frame that was lost or applied
twice. None stops an attacker.
"""

import hashlib
import socket
from collections.abc import Iterable
from functools import reduce

from pagewire.kernels.crc32 import crc32, implementation, receive_crc32

IMPLEMENTATION = implementation()
"""Whose CRC-32 this process computes: "C++" or "zlib"."""

EMPTY_DIGEST = 0
"""The digest of a hand-off without frames."""


def checksum(*buffers: bytes | bytearray | memoryview) -> int:
    """CRC-32 of the bytes of `buffers`, as if they were one; 0 for none.

    Other threads run meanwhile.
    """
    return reduce(extend_checksum, buffers, 0)


def extend_checksum(value: int, buffer: bytes | bytearray | memoryview) -> int:
    """The checksum of what had `value`, followed by `buffer`. Other threads run meanwhile."""
    return crc32(buffer, value)


def receive_checked(sock: socket.socket, target: memoryview, value: int) -> tuple[int, int]:
    """Take what has arrived at `sock`, which does not block, to `target`.

    Returns the number of bytes, 0 when the peer has closed, and the checksum of what had `value`,
    followed by them. Other threads run meanwhile. Raises BlockingIOError when nothing has arrived,
    and OSError when the connection has failed.
    """
    return receive_crc32(sock, target, value)


def checksum_of_sum(total: int, num_bytes: int) -> int:
    """The checksum, 32 bits, of a frame of `num_bytes` that goes from GPU to GPU.

    `total`: the sum that a GPU has made (`pagewire.kernels.gpu.page_checksum`), as int64 has it.
    """
    state = (total + num_bytes + 0x9E3779B97F4A7C15) % 2**64  # SplitMix64, as the kernel has it
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return (state ^ (state >> 31)) >> 32


def digest_of(frame_checksums: Iterable[int]) -> int:
    """The digest of a hand-off whose frames have these checksums, in order of seq."""
    return reduce(extend_digest, frame_checksums, EMPTY_DIGEST)


def extend_digest(digest: int, frame_checksum: int) -> int:
    """`digest` of the frames so far with one more; depends on their order and number.

    No CRC: one in the wrong state does not notice a frame whose checksum is 0.
    """
    chained = digest.to_bytes(4, "little") + frame_checksum.to_bytes(4, "little")
    return int.from_bytes(hashlib.blake2b(chained, digest_size=4).digest(), "little")
