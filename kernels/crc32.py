"""CRC-32 in C++ where it was built and the CPU can run it, by zlib otherwise: the same value.

Several times as fast as zlib's, which is slower than a copy and, on a fast link, than the link.
"""

import ctypes
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

LIBRARY = Path(__file__).parent / "crc" / "_crc32.so"
_MIN_BYTES = 1024  # below, the call would cost more than it saves

_Crc32 = Callable[[int, int, int], int]  # value, address, bytes


def load_crc32(path: Path = LIBRARY) -> _Crc32 | None:
    """The function in C++; None where it was not built or the CPU cannot run it."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    if not library.pagewire_crc32_is_supported():
        return None
    function = library.pagewire_crc32
    function.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int64)
    function.restype = ctypes.c_uint32
    native: _Crc32 = function
    return native


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
    return _NATIVE(value, np.frombuffer(data, dtype=np.uint8).ctypes.data, num_bytes)
