"""The place of a payload: parts of memory that are filled in order, as if they were one.

Whoever brings bytes there does so piece by piece and says so: each piece is then still in a cache
of the CPU, which is when a checksum of it costs least.
"""

import socket
from collections import deque

from pagewire.kv_transfer.checksum import extend_checksum, receive_checked

# Two of them are in the cache of a core at once, where a piece is copied from one to the other.
PIECE_BYTES = 512 * 1024


class Landing:
    """Where one payload lands."""

    def __init__(self, *parts: memoryview) -> None:
        self._rest = deque(part.cast("B") for part in parts if part.nbytes)  # to be filled
        self.num_bytes = sum(map(len, self._rest))

    @property
    def is_full(self) -> bool:
        """Whether `advance` has been told of every byte."""
        return not self._rest

    @property
    def whole(self) -> memoryview | None:
        """All of the place, when it is one part and nobody has called `advance`; else None."""
        return self._rest[0] if self._rest and len(self._rest[0]) == self.num_bytes else None

    def next_piece(self, limit: int = PIECE_BYTES) -> memoryview:
        """Where the next bytes belong: at most `limit`, and contiguous. IndexError when full."""
        return self._rest[0][:limit]

    def advance(self, num_bytes: int) -> None:
        """So many bytes of `next_piece` are there now."""
        self._rest[0] = self._rest[0][num_bytes:]
        if not self._rest[0]:
            self._rest.popleft()

    def receive(self, sock: socket.socket, limit: int) -> int:
        """Take at most `limit` bytes that have arrived at `sock`, which does not block, there.

        Returns how many, 0 when the peer has closed. Raises BlockingIOError when none have arrived,
        OSError when the connection has failed, and IndexError when full.
        """
        count = sock.recv_into(self.next_piece(limit))
        if count:
            self.advance(count)
        return count

    def write(self, data: memoryview) -> None:
        """Copy `data`, no longer than what is left, to where the next bytes belong."""
        while data:
            piece = self.next_piece(min(len(data), PIECE_BYTES))
            piece[:] = data[: len(piece)]
            self.advance(len(piece))
            data = data[len(piece) :]


class CheckedLanding(Landing):
    """A Landing that makes the checksum of what lands."""

    def __init__(self, *parts: memoryview) -> None:
        super().__init__(*parts)
        self._checksum = 0

    def advance(self, num_bytes: int) -> None:
        self._checksum = extend_checksum(self._checksum, self.next_piece(num_bytes))
        super().advance(num_bytes)

    def receive(self, sock: socket.socket, limit: int) -> int:
        piece = self.next_piece(limit)
        count, self._checksum = receive_checked(sock, piece, self._checksum)
        super().advance(count)
        return count

    def checksum(self) -> int:
        """The checksum of the whole payload, once it has landed.

        Fast when the landing is full. Otherwise something that does not call `advance` has filled
        it, such as a network card, and this reads what is left.
        """
        while not self.is_full:
            self.advance(len(self.next_piece(self.num_bytes)))
        return self._checksum
