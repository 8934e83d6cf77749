"""The seam between the hand-off protocol and whatever carries its bytes.

A Transport moves (header, payload) messages between two workers, whole and in order, and knows
nothing of their meaning. Each implementation is driven by one asyncio loop.
"""

from dataclasses import dataclass
from typing import Protocol

from pagewire.kv_transfer.device_memory import DeviceSender
from pagewire.kv_transfer.landing import Landing


class TransportError(Exception):
    """A transport cannot be started, or a peer cannot be reached."""


class ConnectionLost(TransportError):
    """The peer, or the way to it, is gone; what was being sent may or may not have arrived."""


@dataclass(slots=True, kw_only=True)
class TransferStats:
    """Payload bytes and the seconds they took, since the start of a transport."""

    bytes_sent: int = 0
    bytes_received: int = 0
    send_seconds: float = 0.0  # from the start of a send until its buffer was free again
    receive_seconds: float = 0.0  # from a message's header until its payload was here
    failures: int = 0  # connections lost, messages that broke the framing


class Handler(Protocol):
    """What a worker does with arriving messages. Called on the loop; must not block."""

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        """Where the `length` bytes of payload behind `header` shall land.

        None discards them; the message is then not delivered. The memory is the transport's until
        it calls `deliver` or, when the connection ends first, `lost`. A transport that copies the
        payload there itself tells the landing so, piece by piece.
        """

    def deliver(self, peer: bytes, header: bytes) -> None:
        """A message is complete; its payload, if it has one, lies where `place` said."""

    def lost(self, peer: bytes, reason: str) -> None:
        """The last connection to `peer` ended. No buffer of `place` will be written any more."""


class Connection(Protocol):
    """A way to one peer. Either end may open it; both use it in both directions."""

    @property
    def peer(self) -> bytes:
        """Incarnation of the process at the other end."""

    @property
    def on_device(self) -> DeviceSender | None:
        """What sends from GPU to GPU; None where an end or the way between knows host memory only.

        Both ends have it, or neither.
        """

    async def send(self, header: bytes, *payload: memoryview) -> None:
        """Send one message; when this returns, the memory of `payload` may be reused.

        Its parts arrive as one: so what lies in several places need not be gathered first.
        Messages arrive in the order of the calls. Raises ConnectionLost.
        """

    def close(self) -> None:
        """End the connection at once. The peer's handler is told that it was lost."""


class Transport(Protocol):
    """One way to carry messages. Created per worker process with its incarnation and Handler."""

    kind: str
    stats: TransferStats

    @property
    def address(self) -> bytes:
        """What a peer passes to `connect`; at most 1 KiB. Known once `start` has returned."""

    async def start(self) -> None:
        """Begin to accept connections. Raises TransportError with a remedy."""

    def obstacle(self, address: bytes) -> str | None:
        """Why no peer at `address` can be reached this way; None when one may be."""

    async def connect(self, peer: bytes, address: bytes) -> Connection:
        """The connection to the process of incarnation `peer`; made at the first call.

        Raises TransportError when nothing answers there within a few seconds, or when what
        answers is another incarnation.
        """

    def connection(self, peer: bytes) -> Connection | None:
        """The open connection to `peer`, whichever end made it."""

    async def close(self) -> None:
        """End all connections and free every socket, thread and buffer."""
