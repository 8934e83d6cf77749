"""The checksum of a frame, and the digest that a Seal carries over all of them.

Both detect accidents: memory or a network that changed a byte, a frame that was lost or applied
twice. Neither stops an attacker.
"""

import zlib

EMPTY_DIGEST = 0
"""The digest of a hand-off without frames."""


def checksum(*buffers: bytes | bytearray | memoryview) -> int:
    """CRC-32 of the bytes of `buffers`, as if they were one; 0 for none.

    Other threads run meanwhile: zlib releases the GIL.
    """
    value = 0
    for buffer in buffers:
        value = zlib.crc32(buffer, value)
    return value


def extend_digest(digest: int, frame_checksum: int) -> int:
    """`digest` of the frames so far with one more; depends on their order."""
    return zlib.crc32(frame_checksum.to_bytes(4, "little"), digest)
