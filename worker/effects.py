"""What the pure core of a worker asks its shell to do. Carried out in order, per destination."""

from dataclasses import dataclass

from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, Message
from pagewire.proto import worker_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """Send an event up the session of the router that `event.route.receiver` names."""

    event: pb.WorkerEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Make sure of a connection to `peer`; on failure the core is told that the peer is lost."""

    peer: bytes  # incarnation
    addresses: tuple[tuple[str, bytes], ...]  # (transport kind, address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a message without payload to the worker that `message.id.receiver` names."""

    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class SendFrame:
    """Checksum a frame and send it from its pages; then tell the core how it went.

    The pages are pinned until then. `frame.checksum` is 0 here and filled in by the shell.
    """

    frame: Frame
    page_table: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """Verify a frame in its slot and bring it into pages; then tell the core how it went.

    The pages are pinned until then.
    """

    frame: Frame
    source: KVLayout  # of the sender: what the frame's pages and payload are counted in
    page_table: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Verify a frame that has landed in its pages; then tell the core, as after a Scatter.

    The pages are pinned until then.
    """

    frame: Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnect:
    """Close the connection to `peer`, which has stopped answering; its loss is then reported.

    Only that makes what the connection may still read or write safe to use again.
    """

    peer: bytes  # incarnation


Effect = Emit | Connect | Send | SendFrame | Scatter | Verify | Disconnect
