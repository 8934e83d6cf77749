"""CRC-32 in C++ where it was built and the CPU can run it, by zlib otherwise: the same value.

Several times as fast as zlib's, which is slower than a copy and, on a fast link, than the link.
"""

import ctypes
import os
import socket
import ssl
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY = Path(__file__).parent / "crc" / "_crc32.so"
_MIN_BYTES = 1024  # below, the call would cost more than it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeCrc32:
    """The functions of the library. Other threads run meanwhile: they release the GIL."""

    add: Callable[[int, int, int], int]  # value, address, bytes
    # Descriptor of a socket, address, bytes, a pointer to the value: the number of bytes, negative
    # when it is an error's.
    receive: Callable[[int, int, int, Any], int]


def load_crc32(path: Path = LIBRARY) -> NativeCrc32 | None:
    """The functions in C++; None where they were not built or the CPU cannot run them."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    if not library.pagewire_crc32_is_supported():
        return None
    library.pagewire_crc32.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int64)
    library.pagewire_crc32.restype = ctypes.c_uint32
    library.pagewire_receive_crc32.argtypes = (
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.POINTER(ctypes.c_uint32),
    )
    library.pagewire_receive_crc32.restype = ctypes.c_int64
    return NativeCrc32(add=library.pagewire_crc32, receive=library.pagewire_receive_crc32)


_NATIVE = load_crc32()


def implementation() -> str:
    """Whose CRC-32 this process computes, for the user: "C++" or "zlib"."""
    return "zlib" if _NATIVE is None else "C++"


def crc32(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """The CRC-32 of what had `value`, followed by `data`, which must be contiguous.

    Other threads run meanwhile: the GIL is released.
    """
    num_bytes = memoryview(data).nbytes
    if _NATIVE is None or num_bytes < _MIN_BYTES:
        return zlib.crc32(data, value)
    return _NATIVE.add(value, _address(data), num_bytes)


def receive_crc32(sock: socket.socket, target: memoryview, value: int) -> tuple[int, int]:
    """Take what has arrived at `sock`, which does not block, to `target`.

    Returns the number of bytes, 0 when the peer has closed, and the CRC-32 of what had `value`,
    followed by them. In C++ that is made of pieces which the CPU has just copied and still has in
    a cache. Raises BlockingIOError when nothing has arrived, and OSError as `recv_into`.
    """
    if _NATIVE is None or isinstance(sock, ssl.SSLSocket):  # whose bytes are to be decrypted
        count = sock.recv_into(target)
        return count, crc32(target[:count], value)
    updated = ctypes.c_uint32(value)
    count = _NATIVE.receive(sock.fileno(), _address(target), target.nbytes, ctypes.byref(updated))
    if count < 0:
        raise OSError(-count, os.strerror(-count))  # of the subclass that belongs to the number
    return count, updated.value


def _address(data: bytes | bytearray | memoryview) -> int:
    address: int = np.frombuffer(data, dtype=np.uint8).ctypes.data
    return address
