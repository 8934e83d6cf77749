"""What every transport promises, asserted for each of them through the same tests."""

import asyncio
import functools
import logging
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.kv_transfer.framing import FramingError
from pagewire.kv_transfer.gloo import GlooTransport
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.local import LocalHub, LocalTransport
from pagewire.kv_transfer.messages import MAX_HEADER_BYTES
from pagewire.kv_transfer.select import probe
from pagewire.kv_transfer.shm import ShmTransport
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.tls import Tls
from pagewire.kv_transfer.transport import Connection, ConnectionLost, Transport, TransportError
from pagewire.kv_transfer.ucx import UcxTransport

KINDS = ["local", "tcp", "tls", "shm", "gloo", *(["ucx"] if probe().usable else [])]
PATIENCE_S = 20.0
A, B, C = b"a" * 16, b"b" * 16, b"c" * 16

every_kind = pytest.mark.parametrize("kind", KINDS)


class Inbox:
    """A Handler that remembers everything, and can be told to misbehave."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, bytes]] = []
        self.reasons: list[str] = []
        self.on_place: Callable[[bytes], None] = lambda header: None
        self.on_deliver: Callable[[bytes], None] = lambda header: None
        self._places: dict[bytes, bytearray] = {}
        self._changed = asyncio.Event()

    @property
    def headers(self) -> list[bytes]:
        return [header for header, _ in self.messages]

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        self.on_place(header)
        if header.startswith(b"discard"):
            return None
        if header.startswith(b"short"):
            length -= 1
        self._places[header] = bytearray(length)
        return Landing(memoryview(self._places[header]))

    def deliver(self, peer: bytes, header: bytes) -> None:
        assert not self.reasons, "a message was delivered after its peer was lost"
        self.on_deliver(header)
        self.messages.append((header, bytes(self._places.pop(header, b""))))
        self._changed.set()

    def lost(self, peer: bytes, reason: str) -> None:
        assert peer in (A, B)
        self.reasons.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def until_lost(self) -> None:
        await self.until(lambda: self.reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two started transports, not connected yet."""

    a: Transport
    b: Transport
    inbox_a: Inbox
    inbox_b: Inbox

    async def join(self) -> tuple[Connection, Connection]:
        """Both ends of a connection that `a` makes; `b` may have its end a little later."""
        ab = await self.a.connect(B, self.b.address)
        while (ba := self.b.connection(A)) is None:
            await asyncio.sleep(0)
        return ab, ba


@functools.cache
def worker_tls() -> Tls:
    with tempfile.TemporaryDirectory() as directory:
        return Tls(Authority(Path(directory)).worker("worker"))


@asynccontextmanager
async def pair(kind: str) -> AsyncIterator[Pair]:
    inbox_a, inbox_b = Inbox(), Inbox()
    hub = LocalHub()

    def create(incarnation: bytes, inbox: Inbox) -> Transport:
        if kind == "local":
            return LocalTransport(hub=hub, incarnation=incarnation, handler=inbox)
        if kind == "tcp":
            return TcpTransport(incarnation=incarnation, handler=inbox, host="127.0.0.1")
        if kind == "tls":
            return TcpTransport(
                incarnation=incarnation, handler=inbox, host="127.0.0.1", tls=worker_tls()
            )
        if kind == "shm":
            return ShmTransport(incarnation=incarnation, handler=inbox, host="127.0.0.1")
        if kind == "gloo":
            return GlooTransport(incarnation=incarnation, handler=inbox, host="127.0.0.1")
        return UcxTransport(incarnation=incarnation, handler=inbox, host="127.0.0.1")

    a, b = create(A, inbox_a), create(B, inbox_b)
    await a.start()
    await b.start()
    try:
        yield Pair(a=a, b=b, inbox_a=inbox_a, inbox_b=inbox_b)
    finally:
        await a.close()
        await b.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * PATIENCE_S):
            await scenario

    asyncio.run(bounded())


@every_kind
@pytest.mark.parametrize("num_bytes", [0, 1, 2, 4095, 4096, 4097, 65_537, 4 << 20])
def test_payload_arrives_unchanged(kind: str, num_bytes: int) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            payload = os.urandom(num_bytes)
            connection = await p.a.connect(B, p.b.address)
            await connection.send(b"header", memoryview(payload))
            await p.inbox_b.until(lambda: p.inbox_b.messages)
            assert p.inbox_b.messages == [(b"header", payload)]
            assert p.a.stats.bytes_sent == num_bytes
            assert p.b.stats.bytes_received == num_bytes

    run(scenario())


@every_kind
def test_the_parts_of_a_payload_arrive_as_one(kind: str) -> None:
    async def scenario() -> None:
        sizes = (1, 0, 3_000_000, 5, 1 << 20, 0)
        async with pair(kind) as p:
            parts = [memoryview(os.urandom(size)) for size in sizes]
            wide = memoryview(os.urandom(8000)).cast("B", (80, 100))
            tiny = [memoryview(bytes([number % 256])) for number in range(3000)]
            connection = await p.a.connect(B, p.b.address)
            await connection.send(b"parts", *parts)
            await connection.send(b"wide", wide, wide)
            await connection.send(b"tiny", *tiny)
            await p.inbox_b.until(lambda: len(p.inbox_b.messages) == 3)
            payloads = dict(p.inbox_b.messages)
            assert payloads[b"parts"] == b"".join(parts)
            assert payloads[b"wide"] == wide.tobytes() * 2
            assert payloads[b"tiny"] == b"".join(tiny)

    run(scenario())


@every_kind
def test_a_payload_lands_in_several_parts(kind: str) -> None:
    async def scenario() -> None:
        payload = os.urandom(5_000_000)
        sizes = (1, 4095, 3_000_000, len(payload) - 3_004_096)
        parts = [bytearray(size) for size in sizes]
        async with pair(kind) as p:
            place = p.inbox_b.place

            def place_in_parts(peer: bytes, header: bytes, length: int) -> Landing | None:
                place(peer, header, length)
                return Landing(*[memoryview(part) for part in parts])

            p.inbox_b.place = place_in_parts  # type: ignore[method-assign]
            connection = await p.a.connect(B, p.b.address)
            await connection.send(b"header", memoryview(payload))
            await p.inbox_b.until(lambda: p.inbox_b.messages)
        assert b"".join(parts) == payload

    run(scenario())


@every_kind
def test_messages_keep_the_order_of_the_calls(kind: str) -> None:
    @settings(max_examples=15, deadline=None)
    @given(
        sizes=st.lists(st.sampled_from([None, 0, 1, 5000, 300_001]), max_size=40),
        seed=st.integers(0, 255),
    )
    def check(sizes: list[int | None], seed: int) -> None:
        run(scenario(sizes, seed))

    async def scenario(sizes: list[int | None], seed: int) -> None:
        async with pair(kind) as p:
            connection = await p.a.connect(B, p.b.address)
            expected = [
                (b"%d" % number, bytes([(seed + number) % 256]) * (size or 0))
                for number, size in enumerate(sizes)
            ]
            async with asyncio.TaskGroup() as group:
                for (header, payload), size in zip(expected, sizes, strict=True):
                    body = () if size is None else (memoryview(payload),)
                    group.create_task(connection.send(header, *body))
            await p.inbox_b.until(lambda: len(p.inbox_b.messages) == len(expected))
            assert p.inbox_b.messages == expected

    check()


@every_kind
def test_both_directions_at_once(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            ab, ba = await p.join()
            assert (ab.peer, ba.peer) == (B, A)
            payload = memoryview(os.urandom(1 << 20))
            async with asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(ab.send(b"ab%d" % number, payload))
                    group.create_task(ba.send(b"ba%d" % number, payload))
            await p.inbox_a.until(lambda: len(p.inbox_a.messages) == 20)
            await p.inbox_b.until(lambda: len(p.inbox_b.messages) == 20)
            assert p.inbox_a.messages == [(b"ba%d" % n, payload.tobytes()) for n in range(20)]
            assert p.inbox_b.messages == [(b"ab%d" % n, payload.tobytes()) for n in range(20)]

    run(scenario())


@every_kind
def test_a_payload_may_be_reused_when_send_returns(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            connection = await p.a.connect(B, p.b.address)
            buffer = bytearray(1 << 20)
            for number in range(10):
                buffer[:] = bytes([number]) * len(buffer)
                await connection.send(b"%d" % number, memoryview(buffer))
            buffer[:] = bytes(len(buffer))
            await p.inbox_b.until(lambda: len(p.inbox_b.messages) == 10)
            for number, (_, payload) in enumerate(p.inbox_b.messages):
                assert payload == bytes([number]) * len(buffer)

    run(scenario())


@every_kind
def test_a_payload_without_a_place_is_discarded(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            connection = await p.a.connect(B, p.b.address)
            payload = memoryview(os.urandom(300_000))
            for header in (b"1", b"discard 2", b"3", b"discard 4", b"5"):
                await connection.send(header, payload)
            await p.inbox_b.until(lambda: len(p.inbox_b.messages) == 3)
            assert p.inbox_b.messages == [(h, payload.tobytes()) for h in (b"1", b"3", b"5")]
            assert p.b.stats.bytes_received == 3 * len(payload)

    run(scenario())


@every_kind
@pytest.mark.parametrize("closing_end", ["sender", "receiver"])
def test_close_while_sends_are_under_way(kind: str, closing_end: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            ab, ba = await p.join()
            closing = ab if closing_end == "sender" else ba
            p.inbox_b.on_place = lambda header: closing.close() if header == b"5" else None
            payload = memoryview(bytes(4 << 20))
            sends = [ab.send(b"%d" % number, payload) for number in range(20)]
            results = await asyncio.gather(*sends, return_exceptions=True)
            await p.inbox_a.until_lost()
            await p.inbox_b.until_lost()
            assert all(result is None or type(result) is ConnectionLost for result in results)
            assert type(results[-1]) is ConnectionLost
            for connection in (ab, ba):
                with pytest.raises(ConnectionLost):
                    await connection.send(b"late")
            assert p.a.connection(B) is None and p.b.connection(A) is None
            assert p.inbox_b.headers == [b"%d" % number for number in range(len(p.inbox_b.headers))]
        assert len(p.inbox_a.reasons) == len(p.inbox_b.reasons) == 1
        assert "closed by this worker" in (*p.inbox_a.reasons, *p.inbox_b.reasons)

    run(scenario())


@every_kind
def test_buffers_are_not_written_after_lost(kind: str) -> None:
    async def scenario() -> None:
        places: list[memoryview] = []

        class Keeping(Inbox):
            def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
                places.append(memoryview(bytearray(length)))
                return Landing(places[-1])

            def lost(self, peer: bytes, reason: str) -> None:
                for view in places:
                    view[:] = b"\xee" * len(view)
                super().lost(peer, reason)

        async with pair(kind) as p:
            keeping = Keeping()
            p.inbox_b.place = keeping.place  # type: ignore[method-assign]
            p.inbox_b.lost = keeping.lost  # type: ignore[method-assign]
            ab = await p.a.connect(B, p.b.address)
            sends = [
                asyncio.create_task(ab.send(b"%d" % number, memoryview(bytes(1 << 20))))
                for number in range(20)
            ]
            await p.inbox_b.until(lambda: p.inbox_b.messages)
            connection = p.b.connection(A)
            assert connection is not None
            connection.close()
            await keeping.until_lost()
            await asyncio.gather(*sends, return_exceptions=True)
        assert places
        assert all(view == b"\xee" * len(view) for view in places)

    run(scenario())


@every_kind
def test_a_cancelled_send_never_breaks_a_later_message(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            ab = await p.a.connect(B, p.b.address)
            tasks = [
                asyncio.create_task(ab.send(b"%d" % number, memoryview(bytes(4 << 20))))
                for number in range(4)
            ]
            await p.inbox_b.until(lambda: p.inbox_b.messages)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if p.a.connection(B) is not ab or p.inbox_a.reasons:
                return  # ended, as it may: then nothing follows
            try:
                await ab.send(b"last", memoryview(b"last"))
            except ConnectionLost:
                return
            await p.inbox_b.until(lambda: b"last" in p.inbox_b.headers or p.inbox_b.reasons)
            for header, payload in p.inbox_b.messages:
                assert payload == (b"last" if header == b"last" else bytes(4 << 20))

    run(scenario())


@every_kind
def test_another_incarnation_is_refused(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            with pytest.raises(TransportError, match="incarnation"):
                await p.a.connect(C, p.b.address)
            assert p.a.connection(C) is None
            assert (await p.a.connect(B, p.b.address)).peer == B
        assert len(p.inbox_a.reasons) == len(p.inbox_b.reasons) == 1

    run(scenario())


@every_kind
def test_an_address_where_nobody_is(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            address = p.b.address
            await p.b.close()
            with pytest.raises(TransportError):
                await p.a.connect(B, address)
            assert p.a.connection(B) is None

    run(scenario())


@every_kind
def test_connections_are_reused_and_can_be_made_again(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            first, second = await asyncio.gather(
                p.a.connect(B, p.b.address), p.a.connect(B, p.b.address)
            )
            assert first is second is p.a.connection(B)
            first.close()
            await p.inbox_a.until_lost()
            await p.inbox_b.until_lost()
            p.inbox_b.reasons.clear()
            again = await p.a.connect(B, p.b.address)
            assert again is not first
            await again.send(b"again", memoryview(b"payload"))
            await p.inbox_b.until(lambda: p.inbox_b.messages)
            assert p.inbox_b.messages == [(b"again", b"payload")]

    run(scenario())


@every_kind
def test_both_ends_connect_at_once(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            ab, ba = await asyncio.gather(p.a.connect(B, p.b.address), p.b.connect(A, p.a.address))
            await ab.send(b"to b", memoryview(b"1" * 10_000))
            await ba.send(b"to a", memoryview(b"2" * 10_000))
            await p.inbox_b.until(lambda: p.inbox_b.messages)
            await p.inbox_a.until(lambda: p.inbox_a.messages)
            ab.close()
            await p.inbox_a.until_lost()
            await p.inbox_b.until_lost()
            assert p.a.connection(B) is None and p.b.connection(A) is None
        assert len(p.inbox_a.reasons) == len(p.inbox_b.reasons) == 1

    run(scenario())


@every_kind
@pytest.mark.parametrize("callback", ["place", "deliver"])
def test_a_callback_that_fails_closes_the_connection(
    kind: str, callback: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(header: bytes) -> None:
        raise RuntimeError("no place to put it")

    async def scenario() -> None:
        async with pair(kind) as p:
            setattr(p.inbox_b, f"on_{callback}", fail)
            connection = await p.a.connect(B, p.b.address)
            with pytest.raises(ConnectionLost):
                while True:
                    await connection.send(b"header", memoryview(bytes(100_000)))
            await p.inbox_a.until_lost()
            await p.inbox_b.until_lost()
        assert len(p.inbox_a.reasons) == len(p.inbox_b.reasons) == 1
        assert p.b.stats.failures == 1

    with caplog.at_level(logging.ERROR):
        run(scenario())
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [str(error) for error in errors] == ["no place to put it"]


@every_kind
def test_a_place_of_the_wrong_size_is_never_written(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            connection = await p.a.connect(B, p.b.address)
            with pytest.raises(ConnectionLost):
                while True:
                    await connection.send(b"short", memoryview(bytes(100_000)))
            await p.inbox_b.until_lost()
            assert p.inbox_b.messages == []

    run(scenario())


@every_kind
def test_a_header_over_the_limit_is_refused_before_it_is_sent(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            connection = await p.a.connect(B, p.b.address)
            with pytest.raises(FramingError, match="header"):
                await connection.send(bytes(MAX_HEADER_BYTES + 1))
            await connection.send(bytes(MAX_HEADER_BYTES), memoryview(b"payload"))
            await p.inbox_b.until(lambda: p.inbox_b.messages)
            assert p.inbox_b.messages == [(bytes(MAX_HEADER_BYTES), b"payload")]

    run(scenario())


@every_kind
def test_closing_a_transport_loses_its_peers(kind: str) -> None:
    async def scenario() -> None:
        async with pair(kind) as p:
            await p.a.connect(B, p.b.address)
            await p.a.close()
            assert p.inbox_a.reasons == ["closed by this worker"]
            await p.inbox_b.until_lost()
            assert p.inbox_b.reasons == ["the peer closed the connection"]

    run(scenario())


@every_kind
def test_a_loop_in_another_thread(kind: str) -> None:
    failures: list[BaseException] = []

    async def scenario() -> None:
        async with pair(kind) as p:
            connection = await p.a.connect(B, p.b.address)
            await connection.send(b"header", memoryview(b"x" * 1_000_000))
            await p.inbox_b.until(lambda: p.inbox_b.messages)

    def work() -> None:
        try:
            run(scenario())
        except BaseException as error:  # re-raised in the main thread
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
