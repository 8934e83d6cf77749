"""What a worker has to say to its peers, in order, one queue and one task per peer."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

from pagewire.kv_transfer.messages import Frame, Message, encode
from pagewire.kv_transfer.select import Candidate, candidates
from pagewire.kv_transfer.transport import Connection, Transport, TransportError
from pagewire.worker.effects import Connect, Send, SendFrame
from pagewire.worker.frames import PageReader
from pagewire.worker.interval import Interval
from pagewire.worker.tasks import Spawn

logger = logging.getLogger(__name__)

_Outgoing = Connect | Send | SendFrame

# The frame, its checksum unless it was not sent, and when that was made unless it was not.
OnFrameSent = Callable[[Frame, int | None, Interval | None], None]


class Links:
    """Carries out Connect, Send and SendFrame; tells the shell of frames sent and peers lost."""

    def __init__(
        self,
        *,
        transports: Sequence[Transport],
        reader: PageReader | None,
        io_thread: Executor,
        on_frame_sent: OnFrameSent,
        on_peer_lost: Callable[[bytes], None],
        spawn: Spawn,
        clock: Callable[[], float],
    ) -> None:
        self.transports: Mapping[str, Transport] = {item.kind: item for item in transports}
        self._reader = reader
        self._io_thread = io_thread
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

    def connection(self, peer: bytes) -> Connection | None:
        """The open connection to `peer`, over whichever transport."""
        for transport in self.transports.values():
            connection = transport.connection(peer)
            if connection is not None:
                return connection
        return None

    def drop(self, peer: bytes) -> None:
        """The connection to `peer` is gone; so is everything that was queued for it."""
        link = self._links.pop(peer, None)
        if link is not None:
            link.close()

    async def close(self) -> None:
        for peer in list(self._links):
            self.drop(peer)
        for transport in self.transports.values():
            await transport.close()

    async def connect(self, peer: bytes, addresses: tuple[tuple[str, bytes], ...]) -> None:
        """Make sure of a connection over the best transport that works between both ends.

        Raises TransportError when none does.
        """
        if self.connection(peer) is not None:
            return
        *others, last = candidates(self.transports, addresses)
        for candidate in others:
            try:
                await self._connect(peer, candidate)
                return
            except TransportError as error:
                logger.warning("%s to %s: %s", candidate.transport.kind, peer.hex()[:8], error)
        await self._connect(peer, last)

    async def _connect(self, peer: bytes, candidate: Candidate) -> None:
        await candidate.transport.connect(peer, candidate.address)
        logger.info(
            "KV frames to %s go over %s: %s",
            peer.hex()[:8],
            candidate.transport.kind,
            candidate.reason,
        )

    def disconnect(self, peer: bytes) -> None:
        """Close whatever connects to `peer`; the transport then reports the loss."""
        connection = self.connection(peer)
        if connection is not None:
            connection.close()

    async def send_frame(self, connection: Connection, effect: SendFrame) -> None:
        """Checksum and send a frame; whatever happens, its pages are let go."""
        assert self._reader is not None, "only a prefill worker sends frames"
        checksum: int | None = None
        gathered: Interval | None = None
        started = self._clock()
        try:
            frame, payload = await asyncio.get_running_loop().run_in_executor(
                self._io_thread, self._reader.read, effect.frame, effect.page_table
            )
            gathered = Interval(started, self._clock())
            await connection.send(encode(frame), *payload)
            checksum = frame.checksum
        finally:
            self.on_frame_sent(effect.frame, checksum, gathered)

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
        self._queue: deque[_Outgoing] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def put(self, effect: _Outgoing) -> None:
        self._queue.append(effect)
        if self._task is None or self._task.done():
            self._task = self._links.spawn(self._drain())

    def close(self) -> None:
        """Stop, and let go of what was not sent; what is being sent ends with its connection."""
        self._is_closed = True
        while self._queue:
            effect = self._queue.popleft()
            if isinstance(effect, SendFrame):
                self._links.on_frame_sent(effect.frame, None, None)

    async def _drain(self) -> None:
        while self._queue and not self._is_closed:
            effect = self._queue.popleft()
            try:
                await self._carry_out(effect)
            except TransportError as error:
                logger.warning("cannot reach %s: %s", self._peer.hex()[:8], error)
                self._on_error()

    def _on_error(self) -> None:
        """Where a connection broke, its transport reports the loss, once nothing uses it."""
        if self._is_closed:
            return
        if self._links.connection(self._peer) is not None:
            self._links.disconnect(self._peer)
        else:
            self._links.report_unreachable(self._peer, self)
        self.close()

    async def _carry_out(self, effect: _Outgoing) -> None:
        if isinstance(effect, Connect):
            await self._links.connect(self._peer, effect.addresses)
            return
        connection = self._links.connection(self._peer)
        if isinstance(effect, SendFrame):
            if connection is None:
                self._links.on_frame_sent(effect.frame, None, None)
            else:
                await self._links.send_frame(connection, effect)
        elif connection is not None:
            await connection.send(encode(effect.message))
        if connection is None:
            raise TransportError("there is no connection any more")


def _message(effect: Send | SendFrame) -> Message:
    return effect.message if isinstance(effect, Send) else effect.frame
