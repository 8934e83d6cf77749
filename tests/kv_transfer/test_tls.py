"""TLS on tcp: who has no certificate of our authority is refused before anything is parsed."""

import asyncio
import datetime
import os
import socket
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority

from pagewire.kv_transfer import socket_transport
from pagewire.kv_transfer.handshake import Hello
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.tls import Tls, TlsError, TlsFiles
from pagewire.kv_transfer.transport import TransportError

ME, PEER = b"m" * 16, b"p" * 16
PATIENCE_S = 20.0


class Nobody:
    """A Handler that nothing must reach."""

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        raise AssertionError

    def deliver(self, peer: bytes, header: bytes) -> None:
        raise AssertionError

    def lost(self, peer: bytes, reason: str) -> None:
        raise AssertionError


class Sink(Nobody):
    """A Handler that keeps what arrives."""

    def __init__(self) -> None:
        self.payloads: dict[bytes, bytearray] = {}
        self.arrived: asyncio.Queue[bytes] = asyncio.Queue()

    def place(self, peer: bytes, header: bytes, length: int) -> Landing:
        self.payloads[header] = bytearray(length)
        return Landing(memoryview(self.payloads[header]))

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.arrived.put_nowait(header)

    def lost(self, peer: bytes, reason: str) -> None:
        pass


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> TlsFiles:
    return authority.worker("worker")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario

    asyncio.run(bounded())


@asynccontextmanager
async def started(
    incarnation: bytes, files: TlsFiles | None, handler: Nobody | None = None
) -> AsyncIterator[TcpTransport]:
    transport = TcpTransport(
        incarnation=incarnation,
        handler=handler or Nobody(),
        host="127.0.0.1",
        tls=None if files is None else Tls(files),
    )
    await transport.start()
    try:
        yield transport
    finally:
        await transport.close()


def port_of(transport: TcpTransport) -> int:
    return int(transport.address.decode().partition("/")[0].rpartition(":")[2])


async def until_refused(transport: TcpTransport) -> None:
    while not transport.stats.failures:
        await asyncio.sleep(0)
    assert transport.connection(PEER) is None


def test_frames_arrive_whole_and_none_of_it_can_be_read_on_the_way(files: TlsFiles) -> None:
    payload, header = b"a secret prompt " * 300_000, b"header in the clear?"
    seen = bytearray()

    async def wiretap(
        target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(1 << 16):
                    seen.extend(data)
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    async def scenario() -> None:
        sink = Sink()
        async with started(PEER, files, sink) as there, started(ME, files, Sink()) as here:
            tap = await asyncio.start_server(
                lambda reader, writer: wiretap(port_of(there), reader, writer), "127.0.0.1", 0
            )
            address = f"127.0.0.1:{tap.sockets[0].getsockname()[1]}/tls"
            connection = await here.connect(PEER, address.encode())
            await connection.send(header, memoryview(payload))
            assert await sink.arrived.get() == header
            assert sink.payloads[header] == payload
            tap.close()
        assert len(seen) > len(payload)
        assert b"secret" not in seen and header not in seen and ME not in seen

    run(scenario())


def test_a_peer_without_a_certificate_never_reaches_the_parser(
    files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(*_: object) -> Hello:
        raise AssertionError("a stranger's bytes were parsed")

    monkeypatch.setattr(socket_transport, "receive_hello", unreachable)

    async def scenario() -> None:
        context = ssl.create_default_context(cafile=files.ca)
        context.check_hostname = False
        async with started(ME, files) as transport:
            with suppress(OSError):  # refused while it shakes hands, or while it reads
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port_of(transport), ssl=context
                )
                with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
                    await reader.read()
                writer.close()
            await until_refused(transport)

    run(scenario())


def test_plain_bytes_on_a_tls_port_are_refused(files: TlsFiles) -> None:
    async def scenario() -> None:
        async with started(ME, files) as transport:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(transport))
            writer.write(Hello(kind="tcp", sender=PEER, receiver=ME, note=b"").encode())
            with suppress(ConnectionResetError):
                assert ME not in await reader.read()
            writer.close()
            await until_refused(transport)

    run(scenario())


def test_an_older_version_of_tls_is_refused(files: TlsFiles) -> None:
    async def scenario() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(files.ca)
        context.load_cert_chain(files.cert, files.key)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with started(ME, files) as transport:
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", port_of(transport), ssl=context)
            await until_refused(transport)

    run(scenario())


@pytest.mark.parametrize("wrong", ["listens", "connects"])
@pytest.mark.parametrize("fault", ["authority", "expired"])
def test_a_certificate_that_is_not_ours_is_refused(
    wrong: str, fault: str, authority: Authority, files: TlsFiles, tmp_path: Path
) -> None:
    if fault == "authority":
        other = Authority(tmp_path, "other").worker("worker")
        bad = replace(other, ca=authority.ca)  # it accepts us; we do not accept it
    else:
        bad = authority.worker("late", expires_in=-datetime.timedelta(days=1))
    there_files, here_files = (bad, files) if wrong == "listens" else (files, bad)

    async def scenario() -> None:
        async with started(PEER, there_files) as there, started(ME, here_files) as here:
            # Who listens may hang up before the one that connects has read why.
            error = TlsError if wrong == "listens" else TransportError
            with pytest.raises(error):
                await here.connect(PEER, there.address)
            assert here.connection(PEER) is None
            while not there.stats.failures:
                await asyncio.sleep(0)
            assert there.connection(ME) is None

    run(scenario())


def test_the_error_of_a_certificate_names_the_remedy(files: TlsFiles, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other").worker("worker")

    async def scenario() -> None:
        async with started(PEER, other) as there, started(ME, files) as here:
            with pytest.raises(TlsError, match=r"verify failed.* of one authority"):
                await here.connect(PEER, there.address)

    run(scenario())


@pytest.mark.parametrize("has_tls", [True, False])
def test_a_worker_with_tls_and_one_without_say_so(has_tls: bool, files: TlsFiles) -> None:
    here_files, there_files = (files, None) if has_tls else (None, files)

    async def scenario() -> None:
        async with started(ME, here_files) as here, started(PEER, there_files) as there:
            assert here.obstacle(there.address) is not None
            with pytest.raises(TransportError, match="has no TLS, which the other demands"):
                await here.connect(PEER, there.address)

    run(scenario())


def test_a_tls_peer_that_turns_out_to_be_plain(files: TlsFiles) -> None:
    async def scenario() -> None:
        async with started(ME, files) as here, started(PEER, None) as there:
            with pytest.raises(TransportError):
                await here.connect(PEER, there.address + b"/tls")
            assert here.connection(PEER) is None

    run(scenario())


def test_what_is_left_in_the_socket_is_not_handed_out_after_a_shutdown(files: TlsFiles) -> None:
    """SSLSocket's own shutdown makes it a plain socket: ciphertext would land in pages."""

    async def scenario() -> None:
        left, right = socket.socketpair()
        for sock in (left, right):
            sock.setblocking(False)
        tls = Tls(files)
        here, there = await asyncio.gather(
            tls.secure(left, is_server=False), tls.secure(right, is_server=True)
        )
        with here, there:
            assert here.sendmsg([b"payload", os.urandom(1000)]) == 1007
            there.shutdown(socket.SHUT_RDWR)
            buffer = bytearray(2000)
            with suppress(OSError):
                count = there.recv_into(buffer)
                assert buffer[:count] == b"" or buffer.startswith(b"payload")

    run(scenario())


@pytest.mark.parametrize("name", ["cert", "key", "ca"])
def test_files_that_cannot_be_read_are_named(name: str, files: TlsFiles, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path / "garbage"):
        if path.name == "garbage":
            path.write_text("no PEM")
        with pytest.raises(TlsError, match=rf"kv_tls_{name}.*{path.name}"):
            Tls(replace(files, **{name: str(path)}))


def test_an_encrypted_key_is_refused_without_a_question(authority: Authority) -> None:
    with pytest.raises(TlsError, match="unencrypted"):
        Tls(authority.encrypted_key("locked"))


def test_a_key_of_another_certificate_is_refused(authority: Authority, files: TlsFiles) -> None:
    with pytest.raises(TlsError, match="with its own key"):
        Tls(replace(files, key=authority.worker("another").key))
