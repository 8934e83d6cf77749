"""What a worker has to say to its peers, in order, one queue and one task per peer."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pagewire.kv_transfer.circuit import CircuitLimits
from pagewire.kv_transfer.messages import Frame, Message, encode
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.transport import (
    Connection,
    ConnectionLost,
    Transport,
    TransportError,
)
from pagewire.worker.connections import Connections
from pagewire.worker.effects import Connect, Send, SendFrame
from pagewire.worker.frame_reads import FrameReads, ReadFrame
from pagewire.worker.interval import Interval
from pagewire.worker.tasks import Spawn

logger = logging.getLogger(__name__)

_Outgoing = Connect | Send | SendFrame

# The frame, its checksum unless it was not sent, and when that was made unless it was not.
OnFrameSent = Callable[[Frame, int | None, Interval | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedFrame:
    """A frame that waits for those before it, while it is being read."""

    effect: SendFrame
    reading: asyncio.Future[ReadFrame]


_Queued = Connect | Send | QueuedFrame


class Links:
    """Carries out Connect, Send and SendFrame; tells the shell of frames sent and peers lost."""

    def __init__(
        self,
        *,
        transports: Sequence[Transport],
        pairs: OneConnection | None = None,
        reads: FrameReads | None,
        on_frame_sent: OnFrameSent,
        on_peer_lost: Callable[[bytes], None],
        has_handoff: Callable[[bytes], bool] = lambda _: True,
        spawn: Spawn,
        clock: Callable[[], float],
        limits: CircuitLimits | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`reads`: of a worker that sends frames. `pairs`, `has_handoff`: see Connections; a pair
        that always has one never moves.
        """
        self.connections = Connections(
            transports=transports,
            pairs=pairs,
            has_handoff=has_handoff,
            spawn=spawn,
            clock=clock,
            limits=limits or CircuitLimits(),
            sleep=sleep,
        )
        self._reads = reads
        self.on_frame_sent = on_frame_sent
        self.spawn = spawn
        self._on_peer_lost = on_peer_lost
        self._clock = clock
        self._links: dict[bytes, _Link] = {}

    def put(self, effect: _Outgoing) -> None:
        """Queue an effect behind those before it to the same peer."""
        peer = effect.peer if isinstance(effect, Connect) else _message(effect).id.receiver
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = _Link(self, peer)
        link.put(effect)

    def drop(self, peer: bytes) -> None:
        """The connection to `peer` is gone; so is everything that was queued for it."""
        self.connections.on_lost(peer)
        link = self._links.pop(peer, None)
        if link is not None:
            link.close()

    async def close(self) -> None:
        for peer in list(self._links):
            self.drop(peer)
        await self.connections.shut_down()

    def disconnect(self, peer: bytes) -> None:
        """Give up the connection to `peer`, on which something stalled; its loss is reported."""
        self.connections.give_up(peer)

    def is_direct(self, peer: bytes) -> bool:
        """Whether the connection to `peer` moves frames from device to device."""
        connection = self.connections.get(peer)
        return connection is not None and connection.on_device is not None

    def read_frame(self, effect: SendFrame) -> QueuedFrame:
        """Begin to read a frame, so that it is there when those before it have left."""
        return QueuedFrame(effect=effect, reading=self._frame_reads.begin(effect))

    async def send_frame(self, connection: Connection | None, queued: QueuedFrame) -> None:
        """Send a frame, where there is a connection; whatever happens, its pages are let go."""
        read: ReadFrame | None = None
        checksum: int | None = None
        try:
            read = await queued.reading
            if connection is not None:
                await _send(connection, read)
                checksum = read.frame.checksum
        finally:
            if read is not None:
                self._frame_reads.end(read)
            self.on_frame_sent(queued.effect.frame, checksum, read.gathered if read else None)

    @property
    def _frame_reads(self) -> FrameReads:
        assert self._reads is not None, "only a prefill worker sends frames"
        return self._reads

    def report_unreachable(self, peer: bytes, link: "_Link") -> None:
        """There is no connection to `peer`, so no transport will report its loss."""
        if self._links.get(peer) is link:
            del self._links[peer]
            self._on_peer_lost(peer)


class _Link:
    """The queue and the task of one peer. The task lives while there is something to say."""

    def __init__(self, links: Links, peer: bytes) -> None:
        self._links = links
        self._peer = peer
        self._queue: deque[_Queued] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def put(self, effect: _Outgoing) -> None:
        if isinstance(effect, SendFrame):
            self._queue.append(self._links.read_frame(effect))
        else:
            self._queue.append(effect)
        if self._task is None or self._task.done():
            self._task = self._links.spawn(self._drain())

    def close(self) -> None:
        """Stop, and let go of what was not sent; what is being sent ends with its connection."""
        self._is_closed = True
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, QueuedFrame):
                self._links.spawn(self._links.send_frame(None, item))

    async def _drain(self) -> None:
        while self._queue and not self._is_closed:
            item = self._queue.popleft()
            connection = self._links.connections.get(self._peer)
            try:
                await self._carry_out(item, connection)
            except TransportError as error:
                logger.warning("cannot reach %s: %s", self._peer.hex()[:8], error)
                self._on_error(connection)

    def _on_error(self, connection: Connection | None) -> None:
        """Where `connection` broke, its transport reports the loss, once nothing uses it.

        If the pair has moved to another connection meanwhile, no hand-off was under way: what could
        not be sent over the one before is of no more use, and the rest goes over the new one.
        """
        if self._is_closed:
            return
        current = self._links.connections.get(self._peer)
        if current is None:
            self._links.report_unreachable(self._peer, self)
        elif current is not connection:
            return
        else:
            self._links.connections.close(self._peer)
        self.close()

    async def _carry_out(self, item: _Queued, connection: Connection | None) -> None:
        if isinstance(item, Connect):
            await self._links.connections.connect(self._peer, item.addresses)
            return
        if isinstance(item, QueuedFrame):
            await self._links.send_frame(connection, item)
        elif connection is not None:
            await connection.send(encode(item.message))
        if connection is None:
            raise TransportError("there is no connection any more")


async def _send(connection: Connection, read: ReadFrame) -> None:
    """Raises ConnectionLost."""
    header = encode(read.frame)
    if isinstance(read.payload, tuple):
        await connection.send(header, *read.payload)
    elif connection.on_device is None:
        raise ConnectionLost("the connection that the frame was read for has ended")
    else:
        await connection.on_device.send_from_device(header, read.payload)


def _message(effect: Send | SendFrame) -> Message:
    return effect.message if isinstance(effect, Send) else effect.frame
