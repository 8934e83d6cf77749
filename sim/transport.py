"""Connections between simulated workers, with the contract of `kv_transfer.transport`.

Messages travel encoded. The two ends of a connection learn of its loss at different times, and
what was sent in between may or may not arrive.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from pagewire.sim.channel import Channel
from pagewire.sim.environment import Environment
from pagewire.sim.process import Process

_CONNECT_TIMEOUT_S = 3.0


class SimHandler(Protocol):
    """What a worker does with arriving messages; slots are known by their number."""

    def place(self, peer: bytes, header: bytes, length: int) -> int | None:
        """The slot in which the payload shall land; None discards the message."""

    def land(self, slot: int, payload: bytes) -> None:
        """The payload is written into the slot."""

    def deliver(self, peer: bytes, header: bytes) -> None:
        """A message is complete."""

    def lost(self, peer: bytes) -> None:
        """The last connection to `peer` ended."""


class Fabric:
    """Which incarnation can be reached."""

    def __init__(self) -> None:
        self._transports: dict[bytes, SimTransport] = {}

    def add(self, transport: "SimTransport") -> None:
        self._transports[transport.incarnation] = transport

    def remove(self, transport: "SimTransport") -> None:
        del self._transports[transport.incarnation]

    def get(self, incarnation: bytes) -> "SimTransport | None":
        return self._transports.get(incarnation)

    def connections(self) -> "list[SimConnection]":
        """Every connection that one end at least believes in, once."""
        found = [item for transport in self._transports.values() for item in transport.connections]
        return list(dict.fromkeys(found))


class SimTransport:
    """The connections of one worker, by peer."""

    def __init__(
        self, *, process: Process, incarnation: bytes, fabric: Fabric, handler: SimHandler
    ) -> None:
        self.process = process
        self.incarnation = incarnation
        self.handler = handler
        self._fabric = fabric
        self._connections: dict[bytes, list[SimConnection]] = {}
        fabric.add(self)

    @property
    def connections(self) -> "list[SimConnection]":
        return [item for connections in self._connections.values() for item in connections]

    def connection(self, peer: bytes) -> "SimConnection | None":
        """The oldest open connection to `peer`, whichever end made it."""
        connections = self._connections.get(peer)
        return connections[0] if connections else None

    def connect(self, peer: bytes, done: Callable[[bool], None]) -> None:
        """Make a connection; `done` hears whether there is one."""
        environment = self.process.environment
        latency = environment.costs.latency.draw(environment.random)
        target = self._fabric.get(peer)
        if target is None:
            self.process.after(latency, partial(done, False))
            return
        attempt = _Attempt(SimConnection(environment, self, target), done)
        target.process.after(latency, attempt.accept)
        self.process.after(_CONNECT_TIMEOUT_S, attempt.give_up)

    def adopt(self, connection: "SimConnection") -> None:
        self._connections.setdefault(connection.other(self).incarnation, []).append(connection)

    def knows(self, connection: "SimConnection") -> bool:
        return connection in self._connections.get(connection.other(self).incarnation, ())

    def leave(self) -> None:
        """The process is gone."""
        self._fabric.remove(self)

    def on_ended(self, connection: "SimConnection") -> None:
        """This end has noticed. Connections to the same peer fall together."""
        if not self.knows(connection):
            return
        peer = connection.other(self).incarnation
        connections = self._connections[peer]
        connections.remove(connection)
        if connections:
            for other in connections:
                other.lose()
            return
        del self._connections[peer]
        self.handler.lost(peer)


class SimConnection:
    """A way between two workers; both use it in both directions."""

    def __init__(self, environment: Environment, one: SimTransport, two: SimTransport) -> None:
        self._environment = environment
        self._ends = (one, two)
        self._channels = {
            end.incarnation: Channel(environment, lambda faults: faults.peer_messages)
            for end in self._ends
        }
        self._is_lost = False

    @property
    def ends(self) -> tuple[SimTransport, SimTransport]:
        return self._ends

    def other(self, end: SimTransport) -> SimTransport:
        one, two = self._ends
        return two if end is one else one

    def send(self, sender: SimTransport, header: bytes, payload: bytes | None = None) -> None:
        """Put a message on its way. What is sent into a lost connection is lost too."""
        if self._is_lost:
            return
        environment = self._environment
        channel = self._channels[sender.incarnation]
        receiver = self.other(sender)
        if payload is None:
            for at in channel.arrivals():
                self._at(at, receiver, partial(self._deliver, receiver, header))
            return
        if environment.happens(channel.faults.corrupt):
            payload = _flip_one_byte(payload, environment.random.randrange(len(payload)))
        duration = environment.costs.wire.draw(environment.random)
        for at in channel.arrivals(duration):
            landing = _Landing(self, receiver, header, payload)
            self._at(at, receiver, landing.begin)
            self._at(at + duration, receiver, landing.end)

    def lose(self) -> None:
        """The way is gone; both ends notice, sooner or later. Idempotent."""
        if self._is_lost:
            return
        self._is_lost = True
        for end in self._ends:
            delay = self._environment.costs.notice.draw(self._environment.random)
            end.process.after(delay, partial(end.on_ended, self))

    def _at(self, time: float, receiver: SimTransport, action: Callable[[], None]) -> None:
        self._environment.timeline.at(time, lambda: receiver.process.do(action))

    def _deliver(self, receiver: SimTransport, header: bytes) -> None:
        if receiver.knows(self):
            receiver.handler.deliver(self.other(receiver).incarnation, header)


class _Landing:
    """One arrival of a message with payload: first its header, then the rest."""

    def __init__(
        self, connection: SimConnection, receiver: SimTransport, header: bytes, payload: bytes
    ) -> None:
        self._connection = connection
        self._receiver = receiver
        self._header = header
        self._payload = payload
        self._slot: int | None = None

    def begin(self) -> None:
        if self._receiver.knows(self._connection):
            peer = self._connection.other(self._receiver).incarnation
            self._slot = self._receiver.handler.place(peer, self._header, len(self._payload))

    def end(self) -> None:
        if self._slot is not None and self._receiver.knows(self._connection):
            self._receiver.handler.land(self._slot, self._payload)
            peer = self._connection.other(self._receiver).incarnation
            self._receiver.handler.deliver(peer, self._header)


class _Attempt:
    """One connect: the called end accepts, unless the caller's patience ends first."""

    def __init__(self, connection: SimConnection, done: Callable[[bool], None]) -> None:
        self._connection = connection
        self._done = done
        self._is_over = False

    def accept(self) -> None:
        caller, called = self._connection.ends
        called.adopt(self._connection)
        environment = called.process.environment
        latency = environment.costs.latency.draw(environment.random)
        caller.process.after(latency, self._succeed)

    def give_up(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._connection.lose()
            self._done(False)

    def _succeed(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._connection.ends[0].adopt(self._connection)
            self._done(True)


def _flip_one_byte(payload: bytes, index: int) -> bytes:
    return payload[:index] + bytes([payload[index] ^ 0x40]) + payload[index + 1 :]
