"""The fixed-size prefix in front of every message on a socket.

It says how many bytes of header and of payload follow. All of it is bounded and checked before
anything is allocated: these bytes come from a socket. Checksums cover prefix and header, and the
number of the message, which both ends count: so what was lost, repeated, moved or changed on the
way is noticed at once. The payload has a checksum in its header, since its bytes are the user's.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.messages import MAX_HEADER_BYTES
from pagewire.kv_transfer.transport import TransportError

MAX_PAYLOAD_BYTES = 1 << 30
_FIELDS = struct.Struct("!2sBBIQI")  # magic, version, kind, header bytes, payload bytes, checksum
_CHECKSUM = struct.Struct("!I")  # of the fields and of the message's number
_MAGIC = b"PW"
_VERSION = 2
PREFIX_BYTES = _FIELDS.size + _CHECKSUM.size


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
    """Kind, sizes and the header's checksum of one message.

    Raises FramingError when a size is over its limit.
    """

    kind: Kind
    header_bytes: int = 0
    payload_bytes: int = 0
    header_checksum: int = 0

    def __post_init__(self) -> None:
        if self.header_bytes > MAX_HEADER_BYTES:
            raise FramingError(
                f"header of {self.header_bytes} bytes; the limit is {MAX_HEADER_BYTES}"
            )
        if self.payload_bytes > MAX_PAYLOAD_BYTES:
            raise FramingError(
                f"payload of {self.payload_bytes} bytes; the limit is {MAX_PAYLOAD_BYTES}"
            )

    def require_sound(self, header: bytes) -> None:
        """Raise FramingError when `header` is not what was sent."""
        if checksum(header) != self.header_checksum:
            raise FramingError(
                "the header of a message does not have the checksum that it came with"
            )


class Encoder:
    """Frames the messages that one end of a connection sends."""

    def __init__(self) -> None:
        self._num_messages = 0

    def encode(self, kind: Kind, header: bytes = b"", payload_bytes: int = 0) -> bytes:
        """Prefix and header of the next message. Raises FramingError when it is over a limit."""
        prefix = Prefix(
            kind=kind,
            header_bytes=len(header),
            payload_bytes=payload_bytes,
            header_checksum=checksum(header),
        )
        fields = _FIELDS.pack(
            _MAGIC,
            _VERSION,
            prefix.kind,
            prefix.header_bytes,
            prefix.payload_bytes,
            prefix.header_checksum,
        )
        self._num_messages += 1
        return fields + _CHECKSUM.pack(_numbered_checksum(fields, self._num_messages)) + header


class Decoder:
    """Reads the prefixes that the Encoder at the other end wrote."""

    def __init__(self) -> None:
        self._num_messages = 0

    def decode(self, data: bytes | bytearray) -> Prefix:
        """The prefix in the PREFIX_BYTES of `data`, of the next message. Raises FramingError."""
        magic, version, kind, header_bytes, payload_bytes, header_checksum = _FIELDS.unpack_from(
            data
        )
        if magic != _MAGIC:
            raise FramingError("a message does not begin with the magic bytes")
        if version != _VERSION:
            raise FramingError(f"framing version {version}; this worker speaks {_VERSION}")
        self._num_messages += 1
        fields = bytes(data[: _FIELDS.size])
        [found] = _CHECKSUM.unpack_from(data, _FIELDS.size)
        if found != _numbered_checksum(fields, self._num_messages):
            raise FramingError(
                f"message {self._num_messages} of the connection was changed, lost or repeated"
            )
        if kind not in Kind.__members__.values():
            raise FramingError(f"message kind {kind} is unknown")
        return Prefix(
            kind=Kind(kind),
            header_bytes=header_bytes,
            payload_bytes=payload_bytes,
            header_checksum=header_checksum,
        )


def _numbered_checksum(fields: bytes, number: int) -> int:
    return checksum(fields, number.to_bytes(8, "big"))
