"""The CRC-32 in C++ is zlib's, for every length, place and value to go on from."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.kernels.crc32 import crc32, load_crc32

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
            assert native(length, part.ctypes.data, length) == zlib.crc32(part.data, length)


@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=4))
def test_it_goes_on_where_it_was(parts: list[bytes]) -> None:
    value = 0
    for part in parts:
        value = crc32(part, value)
    assert value == zlib.crc32(b"".join(parts))


def test_without_the_library(tmp_path: Path) -> None:
    assert load_crc32(tmp_path / "missing.so") is None
