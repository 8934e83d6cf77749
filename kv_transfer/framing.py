"""The fixed-size prefix in front of every message on a socket.

It says how many bytes of header and of payload follow. All of it is bounded and checked before
anything is allocated: these bytes come from a socket.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from pagewire.kv_transfer.messages import MAX_HEADER_BYTES
from pagewire.kv_transfer.transport import TransportError

MAX_PAYLOAD_BYTES = 1 << 30
_PREFIX = struct.Struct("!2sBBIQ")  # magic, version, kind, header bytes, payload bytes
_MAGIC = b"PW"
_VERSION = 1
PREFIX_BYTES = _PREFIX.size


class FramingError(TransportError):
    """Bytes that are no message, or a message over the limits."""


class Kind(IntEnum):
    """What a prefix introduces."""

    MESSAGE = 1  # a header, then its payload on the same socket
    ANNOUNCE = 2  # a header whose payload travels another way, once the receiver is ready
    READY = 3  # answers the oldest unanswered ANNOUNCE: the payload has a place, send it
    DISCARD = 4  # answers the oldest unanswered ANNOUNCE: the payload is not wanted
    CHUNK = 5  # so many bytes of the announced payload lie in the next slot of the shared ring
    FREED = 6  # answers the oldest unanswered CHUNK: its slot may be filled again


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Kind and sizes of one message.

    Raises FramingError when a size is over its limit.
    """

    kind: Kind
    header_bytes: int = 0
    payload_bytes: int = 0

    def __post_init__(self) -> None:
        if self.header_bytes > MAX_HEADER_BYTES:
            raise FramingError(
                f"header of {self.header_bytes} bytes; the limit is {MAX_HEADER_BYTES}"
            )
        if self.payload_bytes > MAX_PAYLOAD_BYTES:
            raise FramingError(
                f"payload of {self.payload_bytes} bytes; the limit is {MAX_PAYLOAD_BYTES}"
            )

    def encode(self) -> bytes:
        return _PREFIX.pack(_MAGIC, _VERSION, self.kind, self.header_bytes, self.payload_bytes)

    @classmethod
    def decode(cls, data: bytes | bytearray) -> "Prefix":
        """The prefix in the PREFIX_BYTES of `data`. Raises FramingError."""
        magic, version, kind, header_bytes, payload_bytes = _PREFIX.unpack(data)
        if magic != _MAGIC:
            raise FramingError("a message does not begin with the magic bytes")
        if version != _VERSION:
            raise FramingError(f"framing version {version}; this worker speaks {_VERSION}")
        if kind not in Kind.__members__.values():
            raise FramingError(f"message kind {kind} is unknown")
        return cls(kind=Kind(kind), header_bytes=header_bytes, payload_bytes=payload_bytes)
