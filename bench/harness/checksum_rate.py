"""How fast one core makes the checksum of a frame: of bytes in memory, and of bytes in its cache.

The first is what a sender pays, whose pages were written long ago; the second is what a receiver
pays, who has just copied them. With the rate of a transport they give the least that checksums
cost where each end has one core.
"""

import os
import statistics
import time

from pagewire.kv_transfer.checksum import checksum

_MEMORY_BYTES = 256 << 20  # more than caches hold
_PIECE_BYTES = 4 << 20  # of memory: a frame
_CACHED_BYTES = 128 << 10
_REPEATS = 200


def checksum_rates() -> dict[str, float]:
    """GB/s, medians."""
    memory = memoryview(bytearray(os.urandom(1 << 20)) * (_MEMORY_BYTES >> 20))
    pieces = [memory[at : at + _PIECE_BYTES] for at in range(0, _MEMORY_BYTES, _PIECE_BYTES)]
    return {
        "from_memory": _rate(pieces),
        "in_cache": _rate([memory[:_CACHED_BYTES]] * _REPEATS),
    }


def _rate(pieces: list[memoryview]) -> float:
    seconds = []
    for piece in pieces:
        started = time.perf_counter()
        checksum(piece)
        seconds.append(time.perf_counter() - started)
    return len(pieces[0]) / statistics.median(seconds) / 1e9
