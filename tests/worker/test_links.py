"""What a link does when its connection breaks: scripted transports, no sockets."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from handoff_pair import DECODE, PREFILL

from pagewire.kv_transfer.circuit import CircuitLimits
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.messages import Closed, HandoffId, encode
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.transport import (
    Connection,
    ConnectionLost,
    Handler,
    TransferStats,
    TransportError,
)
from pagewire.worker.effects import Connect, Send
from pagewire.worker.links import Links
from pagewire.worker.tasks import TaskSet

LIMITS = CircuitLimits(cooldown_s=10.0, max_losses=3, window_s=60.0)
TURNS = 20  # of the event loop, until all that can happen has


def closed(request_id: str) -> Closed:
    """A message that no hand-off waits for."""
    id = HandoffId(request_id=request_id, attempt=1, sender=PREFILL, receiver=DECODE)
    return Closed(id=id)


class SlowConnection:
    """Takes a message only when the test lets it; ends when it is told to."""

    peer = DECODE
    on_device = None

    def __init__(self, transport: "SlowTransport") -> None:
        self.sent: list[bytes] = []
        self.may_send = asyncio.Event()
        self._transport = transport

    async def send(self, header: bytes, *payload: memoryview) -> None:
        await self.may_send.wait()
        if self._transport.open is not self:
            raise ConnectionLost("the connection has ended")
        self.sent.append(header)

    def close(self) -> None:
        if self._transport.open is self:
            self._transport.open = None
            self.may_send.set()
            self._transport.handler.lost(DECODE, "closed")


class SlowTransport:
    """Refuses connections, or makes one."""

    address = b"here"

    def __init__(self, kind: str, handler: Handler) -> None:
        self.kind = kind
        self.stats = TransferStats()
        self.handler = handler
        self.works = True
        self.open: SlowConnection | None = None

    async def start(self) -> None:
        raise AssertionError

    def obstacle(self, address: bytes) -> str | None:
        return None

    async def connect(self, peer: bytes, address: bytes) -> Connection:
        if not self.works:
            raise TransportError("nobody answers")
        self.open = SlowConnection(self)
        return self.open

    def connection(self, peer: bytes) -> Connection | None:
        return self.open

    async def close(self) -> None:
        pass


class World:
    """The links of one worker over two transports, of which the better does not work at first."""

    def __init__(self) -> None:
        self.now = 100.0
        self.num_lost = 0
        pairs = OneConnection(self)
        self.better, self.other = (SlowTransport(kind, pairs.lane(kind)) for kind in ("ucx", "tcp"))
        pairs.join([self.better, self.other])
        self.better.works = False
        self.links = Links(
            transports=[self.better, self.other],
            pairs=pairs,
            reads=None,
            on_frame_sent=lambda *_: None,
            on_peer_lost=self._on_lost,
            has_handoff=lambda _: False,
            spawn=TaskSet().spawn,
            clock=lambda: self.now,
            limits=LIMITS,
        )

    async def settle(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        raise AssertionError

    def deliver(self, peer: bytes, header: bytes) -> None:
        raise AssertionError

    def lost(self, peer: bytes, reason: str) -> None:
        self.links.drop(peer)
        self._on_lost(peer)

    def _on_lost(self, peer: bytes) -> None:
        self.num_lost += 1


def run(scenario: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def play() -> None:
        await scenario(World())

    asyncio.run(play())


def test_a_message_that_is_stuck_does_not_end_the_connection_that_came_after() -> None:
    """The pair moves while it is being sent: no hand-off is under way, so nothing is in the way."""

    async def scenario(world: World) -> None:
        addresses = (("ucx", b"there"), ("tcp", b"there"))
        world.links.put(Connect(peer=DECODE, addresses=addresses))
        world.links.put(Send(message=closed("stuck")))
        await world.settle()
        before = world.other.open
        assert before is not None and not before.sent

        world.better.works = True
        world.now += LIMITS.cooldown_s
        world.links.connections.improve()
        world.links.put(Send(message=closed("next")))
        await world.settle()
        after = world.better.open
        assert after is not None
        assert world.other.open is None
        after.may_send.set()
        await world.settle()
        assert world.better.open is after
        assert after.sent == [encode(closed("next"))]
        assert world.num_lost == 0

    run(scenario)


def test_a_connection_that_breaks_takes_what_was_to_be_sent_with_it() -> None:
    async def scenario(world: World) -> None:
        world.links.put(Connect(peer=DECODE, addresses=(("tcp", b"there"),)))
        for name in ("first", "second"):
            world.links.put(Send(message=closed(name)))
        await world.settle()
        assert world.other.open is not None
        world.other.open.close()
        await world.settle()
        assert world.num_lost == 1 and world.other.open is None

    run(scenario)


def test_a_peer_that_cannot_be_reached_is_lost_once() -> None:
    async def scenario(world: World) -> None:
        world.other.works = False
        world.links.put(Connect(peer=DECODE, addresses=(("tcp", b"there"),)))
        world.links.put(Send(message=closed("first")))
        await world.settle()
        assert world.num_lost == 1

    run(scenario)
