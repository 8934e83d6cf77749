"""The first bytes on a connection: who speaks, and whom he believes to reach.

Both ends send one Hello. The accepting end answers even when it is not the one that was meant, but
then does not say who it is: an incarnation is known only to those whom a router told.
"""

import socket
import struct
from dataclasses import dataclass

from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.messages import ID_BYTES
from pagewire.kv_transfer.socket_io import receive, send
from pagewire.kv_transfer.transport import TransportError

MAX_NOTE_BYTES = 16 * 1024
_FIXED = struct.Struct(f"!4sB4s{ID_BYTES}s{ID_BYTES}sH")
_MAGIC = b"PGWR"
_CHECKSUM = struct.Struct("!I")  # of all that is before it
_VERSION = 3
NOBODY = bytes(ID_BYTES)  # the sender of an answer to somebody who wanted another process


class HandshakeError(TransportError):
    """What answered is not the worker, or not the protocol, that was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What one end says about itself and about the other."""

    kind: str  # of the transport; at most 4 ASCII characters
    sender: bytes  # incarnation
    receiver: bytes  # incarnation
    note: bytes  # what the transport needs to know about the other end; may be empty

    def encode(self) -> bytes:
        """Raises HandshakeError when the note is too long to send."""
        if len(self.note) > MAX_NOTE_BYTES:
            raise HandshakeError(
                f"the handshake's note has {len(self.note)} bytes; the limit is {MAX_NOTE_BYTES}"
            )
        fixed = _FIXED.pack(
            _MAGIC, _VERSION, self.kind.encode(), self.sender, self.receiver, len(self.note)
        )
        content = fixed + self.note
        return content + _CHECKSUM.pack(checksum(content))


async def send_hello(sock: socket.socket, hello: Hello) -> None:
    """Raises OSError, HandshakeError."""
    await send(sock, hello.encode())


async def receive_hello(sock: socket.socket, kind: str) -> Hello:
    """The peer's Hello. Raises OSError, and HandshakeError when the bytes are none for `kind`."""
    fixed = await receive(sock, _FIXED.size)
    magic, version, their_kind, sender, receiver, note_bytes = _FIXED.unpack(fixed)
    if magic != _MAGIC:
        raise HandshakeError("what speaks there is no Pagewire worker")
    if version != _VERSION:
        raise HandshakeError(
            f"the peer speaks transfer protocol {version}, this worker {_VERSION}; "
            "run the same release on both"
        )
    if their_kind.rstrip(b"\0") != kind.encode():
        raise HandshakeError(f"the peer does not speak {kind} at this address")
    if note_bytes > MAX_NOTE_BYTES:
        raise HandshakeError(f"a note of {note_bytes} bytes; the limit is {MAX_NOTE_BYTES}")
    note = await receive(sock, note_bytes)
    if _CHECKSUM.unpack(await receive(sock, _CHECKSUM.size)) != (checksum(fixed, note),):
        raise HandshakeError("the handshake was changed on its way; look for a faulty network")
    return Hello(kind=kind, sender=sender, receiver=receiver, note=note)
