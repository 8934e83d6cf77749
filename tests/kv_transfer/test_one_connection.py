"""A worker sees one connection to each peer, whatever transports the peer moves between."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.transport import TransferStats, TransportError

PEER = b"p" * 16


class Log:
    """A Handler that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bytes]] = []

    def place(self, peer: bytes, header: bytes, length: int) -> Landing:
        self.calls.append(("place", header))
        return Landing(memoryview(bytearray(length)))

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.calls.append(("deliver", header))

    def lost(self, peer: bytes, reason: str) -> None:
        self.calls.append(("lost", reason.encode()))


class FakeTransport:
    """A Transport with an open connection to PEER, which is its own."""

    stats = TransferStats()
    address = b""
    peer = PEER

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.is_closed = False

    async def start(self) -> None: ...

    def obstacle(self, address: bytes) -> str | None:
        return None

    async def connect(self, peer: bytes, address: bytes) -> "FakeTransport":
        raise TransportError("not asked for")

    def connection(self, peer: bytes) -> Any:
        return None if self.is_closed else self

    @property
    def on_device(self) -> None:
        return None

    async def send(self, header: bytes, *payload: memoryview) -> None: ...

    def close(self) -> Any:
        self.is_closed = True


@pytest.fixture
def log() -> Log:
    return Log()


KINDS = ("shm", "tcp", "ucx")


@pytest.fixture
def transports() -> dict[str, FakeTransport]:
    return {kind: FakeTransport(kind) for kind in KINDS}


@pytest.fixture
def pairs(log: Log, transports: dict[str, FakeTransport]) -> OneConnection:
    pairs = OneConnection(log)
    pairs.join(list(transports.values()))
    return pairs


def test_one_transport_is_passed_through(log: Log, pairs: OneConnection) -> None:
    lane = pairs.lane("shm")
    view = lane.place(PEER, b"1", 3)
    assert view is not None and view.num_bytes == 3
    lane.deliver(PEER, b"1")
    assert pairs.kind(PEER) == "shm"
    lane.lost(PEER, "gone")
    assert log.calls == [("place", b"1"), ("deliver", b"1"), ("lost", b"gone")]
    assert pairs.kind(PEER) is None


def test_a_peer_that_moved_is_followed_once_the_old_connection_has_ended(
    log: Log, pairs: OneConnection, transports: dict[str, FakeTransport]
) -> None:
    pairs.lane("shm").deliver(PEER, b"old")
    pairs.lane("tcp").deliver(PEER, b"open")
    pairs.lane("tcp").deliver(PEER, b"more")
    assert transports["shm"].is_closed and not transports["tcp"].is_closed
    assert log.calls == [("deliver", b"old")]  # its slots may still be written to
    pairs.lane("shm").lost(PEER, "closed")
    assert log.calls[1:] == [("lost", b"closed"), ("deliver", b"open"), ("deliver", b"more")]
    assert pairs.kind(PEER) == "tcp"
    pairs.lane("tcp").lost(PEER, "end")
    assert log.calls[-1] == ("lost", b"end")


def test_a_payload_from_the_connection_that_does_not_count_gets_no_place(
    log: Log, pairs: OneConnection
) -> None:
    pairs.lane("shm").deliver(PEER, b"old")
    assert pairs.lane("tcp").place(PEER, b"frame", 10) is None
    assert ("place", b"frame") not in log.calls


def test_a_successor_that_is_lost_first_is_forgotten(
    log: Log, pairs: OneConnection, transports: dict[str, FakeTransport]
) -> None:
    pairs.lane("shm").deliver(PEER, b"old")
    pairs.lane("tcp").deliver(PEER, b"open")
    pairs.lane("tcp").lost(PEER, "cut")
    pairs.lane("shm").lost(PEER, "closed")
    assert log.calls == [("deliver", b"old"), ("lost", b"closed")]
    assert pairs.kind(PEER) is None


def test_a_peer_that_moves_twice_is_followed_to_the_last(log: Log, pairs: OneConnection) -> None:
    pairs.lane("shm").deliver(PEER, b"old")
    pairs.lane("ucx").deliver(PEER, b"between")
    pairs.lane("tcp").deliver(PEER, b"open")
    pairs.lane("shm").lost(PEER, "closed")
    pairs.lane("ucx").lost(PEER, "closed later")
    assert log.calls == [("deliver", b"old"), ("lost", b"closed"), ("deliver", b"open")]
    assert pairs.kind(PEER) == "tcp"


def test_a_connection_that_carried_nothing_may_end_unnoticed(
    log: Log, pairs: OneConnection
) -> None:
    pairs.lane("tcp").deliver(PEER, b"1")
    pairs.lane("shm").lost(PEER, "a probe that was not used")
    assert log.calls == [("deliver", b"1")]
    assert pairs.kind(PEER) == "tcp"


def test_the_end_that_connects_chooses(
    log: Log, pairs: OneConnection, transports: dict[str, FakeTransport]
) -> None:
    pairs.use(PEER, "tcp")
    pairs.lane("tcp").deliver(PEER, b"1")
    pairs.use(PEER, "shm")
    pairs.lane("tcp").deliver(PEER, b"late")  # from before the peer knew
    pairs.lane("tcp").lost(PEER, "closed")
    pairs.lane("shm").deliver(PEER, b"2")
    assert log.calls == [("deliver", b"1"), ("deliver", b"2")]
    assert not transports["shm"].is_closed
    pairs.lane("shm").lost(PEER, "gone")
    assert log.calls[-1] == ("lost", b"gone")


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), max_size=40))
def test_between_two_losses_everything_comes_from_one_connection(
    story: list[tuple[str, bool]],
) -> None:
    log = Log()
    transports = {kind: FakeTransport(kind) for kind in KINDS}
    pairs = OneConnection(log)
    pairs.join(list(transports.values()))
    spoke: set[str] = set()  # over connections that have not ended
    for kind, ends in story:
        if ends and kind in spoke:
            spoke.remove(kind)
            transports[kind].is_closed = True  # first its transport forgets it
            pairs.lane(kind).lost(PEER, "end")
            transports[kind].is_closed = False
        elif not ends and not transports[kind].is_closed:
            spoke.add(kind)
            pairs.lane(kind).deliver(PEER, kind.encode())
    for kind in sorted(spoke, key=lambda kind: kind != pairs.kind(PEER)):
        pairs.lane(kind).lost(PEER, "end")
    lives: list[set[bytes]] = [set()]
    for call, text in log.calls:
        if call == "lost":
            lives.append(set())
        else:
            lives[-1].add(text)
    assert lives[-1] == set()  # the worker heard of the end of whatever it heard from
    assert all(len(kinds) <= 1 for kinds in lives)
    assert pairs.kind(PEER) is None
