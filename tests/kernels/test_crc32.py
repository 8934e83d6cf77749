"""The CRC-32 in C++ is zlib's, for every length, place and value to go on from."""

import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.kernels.crc32 import crc32, load_crc32, receive_crc32

DATA = bytes((7 * index * index + index // 3) % 256 for index in range(20_000))


@given(
    start=st.integers(0, 100),
    length=st.integers(0, 8000),
    value=st.integers(0, 2**32 - 1),
)
def test_it_is_that_of_zlib(start: int, length: int, value: int) -> None:
    part = memoryview(DATA)[start : start + length]
    assert crc32(part, value) == zlib.crc32(part, value)


@pytest.mark.skipif(load_crc32() is None, reason="it was not built, or the CPU cannot run it")
def test_the_function_in_cpp_alone_at_every_length() -> None:
    native = load_crc32()
    assert native is not None
    data = np.frombuffer(DATA, dtype=np.uint8)
    for start in (0, 1, 15):
        for length in range(700):
            part = data[start : start + length]
            assert native.add(length, part.ctypes.data, length) == zlib.crc32(part.data, length)


@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=4))
def test_it_goes_on_where_it_was(parts: list[bytes]) -> None:
    value = 0
    for part in parts:
        value = crc32(part, value)
    assert value == zlib.crc32(b"".join(parts))


def test_without_the_library(tmp_path: Path) -> None:
    assert load_crc32(tmp_path / "missing.so") is None


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: where bytes are sent, and where they arrive."""
    sender, receiver = socket.socketpair()
    receiver.setblocking(False)
    with sender, receiver:
        yield sender, receiver


@pytest.mark.parametrize("native", ["C++", "zlib"])
class TestReceive:
    @pytest.fixture(autouse=True)
    def _choose(self, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if native == "zlib":
            monkeypatch.setattr("pagewire.kernels.crc32._NATIVE", None)
        elif load_crc32() is None:
            pytest.skip("it was not built, or the CPU cannot run it")

    def test_it_takes_what_is_there(self, ends: tuple[socket.socket, socket.socket]) -> None:
        sender, receiver = ends
        sender.sendall(DATA[:3000])
        memory = bytearray(5000)
        before = zlib.crc32(b"before")
        count, value = receive_crc32(receiver, memoryview(memory)[10:2010], before)
        assert (count, value) == (2000, zlib.crc32(b"before" + DATA[:2000]))
        count, value = receive_crc32(receiver, memoryview(memory)[2010:], value)
        assert (count, value) == (1000, zlib.crc32(b"before" + DATA[:3000]))
        assert memory == bytes(10) + DATA[:3000] + bytes(1990)

    def test_nothing_is_there(self, ends: tuple[socket.socket, socket.socket]) -> None:
        with pytest.raises(BlockingIOError):
            receive_crc32(ends[1], memoryview(bytearray(8)), 0)

    def test_the_end(self, ends: tuple[socket.socket, socket.socket]) -> None:
        sender, receiver = ends
        sender.sendall(b"last")
        sender.close()
        memory = memoryview(bytearray(8))
        assert receive_crc32(receiver, memory, 0) == (4, zlib.crc32(b"last"))
        assert receive_crc32(receiver, memory, 7) == (0, 7)

    def test_a_connection_that_has_failed(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            sender = socket.create_connection(server.getsockname())
            receiver, _ = server.accept()
        with receiver:
            receiver.sendall(b"unread")  # closing a socket with bytes unread resets the connection
            assert sender.recv(1, socket.MSG_PEEK)
            sender.close()
            with pytest.raises(ConnectionResetError):
                receive_crc32(receiver, memoryview(bytearray(8)), 0)
