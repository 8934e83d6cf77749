"""Reads the key-value section at the start of a GGUF file, where the tokenizer is.

The weights behind it are not touched: the tokenizer of a model loads in a fraction of a second.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # value type -> format character of struct


class GGUFError(ValueError):
    """The file is not a GGUF file that this version can read."""


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of the file: numbers, booleans, strings, and lists of these.

    Raises:
        GGUFError: the file is damaged or of an unknown version.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if not file.read(len(_MAGIC)) == _MAGIC:
            raise GGUFError(f"{path.name} is not a GGUF file; give one, or a model directory")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).metadata()
            except (struct.error, UnicodeDecodeError) as error:
                raise GGUFError(f"{path.name} is damaged or cut short; fetch it again") from error


class _Reader:
    """A cursor over little-endian values. Raises struct.error past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._offset = len(_MAGIC)

    def metadata(self) -> dict[str, Any]:
        (version,) = self._numbers("I", 1)
        if version not in _VERSIONS:
            raise GGUFError(f"GGUF version {version} is unknown; convert the file to version 3")
        _num_tensors, num_keys = self._numbers("Q", 2)
        return {self._string(): self._value(self._type()) for _ in range(num_keys)}

    def _type(self) -> int:
        (value_type,) = self._numbers("I", 1)
        return int(value_type)

    def _value(self, value_type: int) -> Any:
        if value_type == _STRING:
            return self._string()
        if value_type == _ARRAY:
            return self._array()
        return self._numbers(_code(value_type), 1)[0]

    def _array(self) -> list[Any]:
        item_type = self._type()
        (length,) = self._numbers("Q", 1)
        if item_type == _STRING:
            return [self._string() for _ in range(length)]
        return list(self._numbers(_code(item_type), length))

    def _string(self) -> str:
        (length,) = self._numbers("Q", 1)
        end = self._offset + length
        if end > len(self._data):
            raise struct.error("a string reaches past the end")
        raw = self._data[self._offset : end]
        self._offset = end
        return raw.decode("utf-8")

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        if count > len(self._data):  # each has a byte at least
            raise struct.error("an array reaches past the end")
        layout = f"<{count}{code}"
        numbers = struct.unpack_from(layout, self._data, self._offset)
        self._offset += struct.calcsize(layout)
        return numbers


def _code(value_type: int) -> str:
    try:
        return _SCALARS[value_type]
    except KeyError:
        raise GGUFError(f"GGUF value type {value_type} is unknown here") from None
