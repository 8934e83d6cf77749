"""Which transport a worker connects a peer over: scripted transports, virtual time."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pagewire.kv_transfer.circuit import CircuitLimits
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.transport import Connection, Handler, TransferStats, TransportError
from pagewire.worker.connections import Connections
from pagewire.worker.tasks import TaskSet

PEER = b"p" * 16
LIMITS = CircuitLimits(cooldown_s=10.0, max_losses=3, window_s=60.0)
ADDRESSES = (("ucx", b"there"), ("tcp", b"there"))


class FakeConnection:
    """A connection that ends when it is told to."""

    peer = PEER
    on_device = None

    def __init__(self, transport: "FakeTransport") -> None:
        self._transport = transport

    async def send(self, header: bytes, *payload: memoryview) -> None:
        raise AssertionError

    def close(self) -> None:
        if self._transport.open is self:
            self._transport.open = None
            self._transport.handler.lost(PEER, "closed")


class FakeTransport:
    """A transport that works or does not, as the test says."""

    address = b"here"

    def __init__(self, kind: str, handler: Handler) -> None:
        self.kind = kind
        self.stats = TransferStats()
        self.handler = handler
        self.works = True
        self.num_attempts = 0
        self.open: FakeConnection | None = None

    async def start(self) -> None:
        raise AssertionError

    def obstacle(self, address: bytes) -> str | None:
        return None

    async def connect(self, peer: bytes, address: bytes) -> Connection:
        self.num_attempts += 1
        if not self.works:
            raise TransportError("nobody answers")
        if self.open is None:
            self.open = FakeConnection(self)
        return self.open

    def connection(self, peer: bytes) -> Connection | None:
        return self.open

    async def close(self) -> None:
        raise AssertionError


class World:
    """One worker's connections, with a clock that only the test moves."""

    def __init__(self, kinds: tuple[str, ...] = ("ucx", "tcp")) -> None:
        self.now = 100.0
        self.is_busy = False
        self.num_lost = 0
        self.slept: list[float] = []
        self.tasks = TaskSet()
        pairs = OneConnection(self)
        self.transports = {kind: FakeTransport(kind, pairs.lane(kind)) for kind in kinds}
        pairs.join(list(self.transports.values()))
        self.connections = Connections(
            transports=list(self.transports.values()),
            pairs=pairs,
            has_handoff=lambda _: self.is_busy,
            spawn=self.tasks.spawn,
            clock=lambda: self.now,
            limits=LIMITS,
            sleep=self._sleep,
        )

    async def connect(self) -> str:
        """The transport that is used then."""
        await self.connections.connect(PEER, ADDRESSES)
        return self.transport

    @property
    def transport(self) -> str:
        [link] = self.connections.states()
        return link.transport

    async def improve(self) -> None:
        """What the shell does from time to time, until all that it begins is over."""
        self.connections.improve()
        for _ in range(5):
            await asyncio.sleep(0)

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        raise AssertionError

    def deliver(self, peer: bytes, header: bytes) -> None:
        raise AssertionError

    def lost(self, peer: bytes, reason: str) -> None:
        self.num_lost += 1
        self.connections.on_lost(peer)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def run(scenario: Callable[[World], Coroutine[Any, Any, None]], *kinds: str) -> None:
    async def play() -> None:
        await scenario(World(kinds or ("ucx", "tcp")))

    asyncio.run(play())


def test_the_best_is_used_and_a_connection_is_kept() -> None:
    async def scenario(world: World) -> None:
        assert await world.connect() == await world.connect() == "ucx"
        assert world.transports["ucx"].num_attempts == 1
        assert world.transports["tcp"].num_attempts == 0

    run(scenario)


def test_one_that_refuses_is_left_alone_for_a_time() -> None:
    async def scenario(world: World) -> None:
        ucx, tcp = world.transports["ucx"], world.transports["tcp"]
        ucx.works = False
        assert await world.connect() == "tcp"
        assert tcp.open is not None
        tcp.open.close()
        assert await world.connect() == "tcp"
        assert (ucx.num_attempts, tcp.num_attempts) == (1, 2)
        assert world.slept == []
        [given_up] = world.connections.states()[0].given_up
        assert (given_up.transport, given_up.cause) == ("ucx", "refused")
        assert given_up.retry_in_s == LIMITS.cooldown_s

    run(scenario)


def test_a_stall_closes_the_connection_and_leads_elsewhere() -> None:
    async def scenario(world: World) -> None:
        assert await world.connect() == "ucx"
        world.connections.give_up(PEER)
        assert world.num_lost == 1 and world.transports["ucx"].open is None
        assert await world.connect() == "tcp"
        assert world.connections.num_trips == {"ucx": 1, "tcp": 0}

    run(scenario)


def test_a_pair_moves_back_when_it_is_idle_and_not_before() -> None:
    async def scenario(world: World) -> None:
        world.transports["ucx"].works = False
        await world.connect()
        world.transports["ucx"].works = world.is_busy = True
        world.now += LIMITS.cooldown_s - 0.5
        await world.improve()
        assert world.transports["ucx"].num_attempts == 1
        world.now += 0.5
        await world.improve()
        assert world.transports["ucx"].num_attempts == 2
        assert world.transport == "tcp"  # a hand-off is under way on it
        world.is_busy = False
        await world.improve()
        assert world.transport == "ucx"
        assert world.transports["tcp"].open is None
        assert world.num_lost == 0  # nothing was: the worker shall not hear of the old connection
        assert world.connections.get(PEER) is world.transports["ucx"].open

    run(scenario)


def test_a_probe_that_fails_harms_nobody_and_the_next_comes_later() -> None:
    async def scenario(world: World) -> None:
        ucx = world.transports["ucx"]
        ucx.works = False
        await world.connect()
        for num_attempts, cooldown_s in ((2, 10.0), (3, 20.0), (4, 40.0)):
            world.now += cooldown_s
            await world.improve()
            await world.improve()
            assert ucx.num_attempts == num_attempts
        assert world.transport == "tcp" and world.num_lost == 0

    run(scenario)


def test_a_better_connection_that_ends_before_it_is_used_is_made_again() -> None:
    async def scenario(world: World) -> None:
        ucx = world.transports["ucx"]
        ucx.works = False
        await world.connect()
        ucx.works = world.is_busy = True
        world.now += LIMITS.cooldown_s
        await world.improve()
        assert ucx.open is not None
        ucx.open.close()
        assert world.num_lost == 0
        world.is_busy = False
        await world.improve()
        assert world.transport == "tcp"
        await world.improve()
        assert world.transport == "ucx"

    run(scenario)


def test_the_only_transport_is_tried_less_often_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(world: World) -> None:
        world.transports["tcp"].works = False
        for _ in range(4):
            with pytest.raises(TransportError, match="nobody answers"):
                await world.connections.connect(PEER, ADDRESSES)
        assert world.slept == pytest.approx([0.1, 0.2, 0.4])
        world.transports["tcp"].works = True
        assert await world.connect() == "tcp"

    with caplog.at_level(logging.INFO):
        run(scenario, "tcp")
    assert "tcp to 70707070 is the only way left; trying again in 0.1 s" in caplog.text


def test_when_all_refuse_the_error_is_that_of_the_last() -> None:
    async def scenario(world: World) -> None:
        for transport in world.transports.values():
            transport.works = False
        with pytest.raises(TransportError, match="nobody answers"):
            await world.connections.connect(PEER, ADDRESSES)
        assert world.connections.states() == []
        world.transports["tcp"].works = True
        assert await world.connect() == "tcp"
        assert len(world.slept) == 1

    run(scenario)


def test_a_new_incarnation_begins_with_the_best() -> None:
    async def scenario(world: World) -> None:
        world.transports["ucx"].works = False
        await world.connect()
        world.connections.close(PEER)
        world.transports["ucx"].works = True
        await world.connections.connect(b"n" * 16, ADDRESSES)
        [link] = world.connections.states()
        assert (link.peer, link.transport) == (b"n" * 16, "ucx")

    run(scenario)
