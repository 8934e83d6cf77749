"""What a simulated worker has to say to its peers: `worker.links` under virtual time.

One queue per peer, worked off in order. Each frame is reported as sent exactly once, whatever
happens to it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.messages import Frame, encode
from pagewire.sim.kv_memory import KvMemory
from pagewire.sim.process import Process
from pagewire.sim.transport import SimConnection, SimTransport
from pagewire.worker.effects import Connect, Send, SendFrame
from pagewire.worker.interval import Interval
from pagewire.worker.links import OnFrameSent

Outgoing = Connect | Send | SendFrame


class Outbox:
    """Carries out Connect, Send and SendFrame."""

    def __init__(
        self,
        *,
        process: Process,
        transport: SimTransport,
        memory: KvMemory,
        on_frame_sent: OnFrameSent,
        on_unreachable: Callable[[bytes], None],
    ) -> None:
        self.process = process
        self.transport = transport
        self.memory = memory
        self.on_frame_sent = on_frame_sent
        self._on_unreachable = on_unreachable
        self._queues: dict[bytes, _PeerQueue] = {}

    def put(self, effect: Outgoing) -> None:
        """Queue an effect behind those before it to the same peer."""
        peer = _peer(effect)
        if peer not in self._queues:
            self._queues[peer] = _PeerQueue(self, peer)
        self._queues[peer].put(effect)

    def drop(self, peer: bytes) -> None:
        """The connection to `peer` is gone; so is everything that was queued for it."""
        queue = self._queues.pop(peer, None)
        if queue is not None:
            queue.close()

    def report_unreachable(self, peer: bytes) -> None:
        """`peer` cannot be reached."""
        queue = self._queues.pop(peer, None)
        self._on_unreachable(peer)
        if queue is not None:
            queue.close()


class _PeerQueue:
    """What is to be said to one peer; one effect at a time is under way."""

    def __init__(self, outbox: Outbox, peer: bytes) -> None:
        self._outbox = outbox
        self._peer = peer
        self._effects: deque[Outgoing] = deque()
        self._is_busy = False
        self._is_closed = False

    def put(self, effect: Outgoing) -> None:
        self._effects.append(effect)
        if not self._is_busy:
            self._is_busy = True
            self._outbox.process.after(0.0, self._go_on)

    def close(self) -> None:
        """Report what is left as not sent; what is under way reports itself."""
        self._is_closed = True
        while self._effects:
            effect = self._effects.popleft()
            if isinstance(effect, SendFrame):
                self._outbox.on_frame_sent(effect.frame, None, None)

    def _go_on(self) -> None:
        while self._effects and not self._is_closed:
            effect = self._effects.popleft()
            if isinstance(effect, Connect):
                if self._connection() is None:
                    self._outbox.transport.connect(self._peer, self._on_connected)
                    return
            elif isinstance(effect, SendFrame):
                self._gather(effect)
                return
            else:
                self._send(effect)
        self._is_busy = False

    def _on_connected(self, is_connected: bool) -> None:
        if is_connected:
            self._go_on()
        elif not self._is_closed:
            self._outbox.report_unreachable(self._peer)

    def _send(self, effect: Send) -> None:
        connection = self._connection()
        if connection is None:
            self._outbox.report_unreachable(self._peer)
            return
        connection.send(self._outbox.transport, encode(effect.message))

    def _gather(self, effect: SendFrame) -> None:
        process = self._outbox.process
        delay = process.environment.costs.gather.draw(process.environment.random)
        process.after(delay, partial(self._start_frame, effect, process.now))

    def _start_frame(self, effect: SendFrame, started: float) -> None:
        """The checksum is known; the pages are read until the payload has left."""
        payload = self._outbox.memory.gather(effect.frame.part, effect.page_table)
        frame = replace(effect.frame, checksum=checksum(payload))
        process = self._outbox.process
        gathered = Interval(started, process.now)
        delay = process.environment.costs.wire.draw(process.environment.random)
        process.after(delay, partial(self._finish_frame, effect, frame, gathered))

    def _finish_frame(self, effect: SendFrame, frame: Frame, gathered: Interval) -> None:
        connection = self._connection()
        if connection is None or self._is_closed:
            self._outbox.on_frame_sent(effect.frame, None, gathered)
            if not self._is_closed:
                self._outbox.report_unreachable(self._peer)
            return
        payload = self._outbox.memory.gather(effect.frame.part, effect.page_table)
        connection.send(self._outbox.transport, encode(frame), payload)
        self._outbox.on_frame_sent(effect.frame, frame.checksum, gathered)
        self._go_on()

    def _connection(self) -> SimConnection | None:
        return self._outbox.transport.connection(self._peer)


def _peer(effect: Outgoing) -> bytes:
    match effect:
        case Connect(peer=peer):
            return peer
        case Send(message=message):
            return message.id.receiver
        case SendFrame(frame=frame):
            return frame.id.receiver
