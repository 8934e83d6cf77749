"""The header of a GGUF file: scalar metadata and where each tensor lies.

The arrays of the metadata, which are the tokenizer's, are stepped over and not decoded: they are
most of a header, and somebody waits for the start. Nothing is read beyond the end of the file,
whatever counts and offsets the header holds.
"""

import struct
from dataclasses import dataclass
from math import prod
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pagewire.engine.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of the file."""

    shape: tuple[int, ...]  # as torch has it: the innermost dimension last
    type: GGMLQuantizationType
    start: int  # byte offset in the file
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFHeader:
    """What stands in front of the tensor data."""

    metadata: dict[str, Any]  # scalars and strings only
    tensors: dict[str, TensorEntry]


def read_header(data: memoryview) -> GGUFHeader:
    """Parse the header of a whole file; raises ModelError when it is damaged or truncated."""
    try:
        return _Reader(data).header()
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"is truncated or damaged: {error}; download it again") from error


class _Reader:
    """A cursor over the header."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GGUFHeader:
        if self._take(4) != MAGIC:
            raise ModelError("is not a GGUF file")
        version = self._scalar("<I")
        if version not in VERSIONS:
            raise ModelError(f"is GGUF version {version}; supported are versions 2 and 3")
        num_tensors, num_values = self._scalar("<Q"), self._scalar("<Q")
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            value = self._value(GGUFValueType(self._scalar("<I")))
            if value is not None:
                metadata[key] = value
        entries = dict(self._entry() for _ in range(num_tensors))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ValueError(f"general.alignment is {alignment!r}")
        return GGUFHeader(metadata=metadata, tensors=self._place(entries, alignment))

    def _place(self, entries: dict[str, TensorEntry], alignment: int) -> dict[str, TensorEntry]:
        """Turn offsets into the data section to offsets into the file."""
        base = -(-self._at // alignment) * alignment
        placed = {}
        for name, entry in entries.items():
            if entry.start % alignment:
                raise ValueError(f"tensor {name} is not aligned to {alignment} bytes")
            end = base + entry.start + entry.num_bytes
            if end > len(self._data):
                raise ModelError(
                    f"is truncated: tensor {name} ends at byte {end}, the file at "
                    f"{len(self._data)}; download it again"
                )
            placed[name] = TensorEntry(
                shape=entry.shape,
                type=entry.type,
                start=base + entry.start,
                num_bytes=entry.num_bytes,
            )
        return placed

    def _entry(self) -> tuple[str, TensorEntry]:
        name = self._string()
        num_dimensions = self._scalar("<I")
        if num_dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(num_dimensions))[::-1]
        kind = GGMLQuantizationType(self._scalar("<I"))
        block_len, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block_len:
            raise ValueError(f"tensor {name} of type {kind.name} has shape {list(shape)}")
        return name, TensorEntry(
            shape=shape,
            type=kind,
            start=self._scalar("<Q"),
            num_bytes=prod(shape) // block_len * block_bytes,
        )

    def _value(self, kind: GGUFValueType) -> Any:
        """A scalar or string; None for an array."""
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind == GGUFValueType.ARRAY:
            return self._skip_array()
        return self._scalar(_FORMATS[kind])

    def _skip_array(self) -> None:
        kind, length = GGUFValueType(self._scalar("<I")), self._scalar("<Q")
        if kind == GGUFValueType.STRING:
            for _ in range(length):
                self._skip(self._scalar("<Q"))
        elif kind == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        else:
            self._skip(length * struct.calcsize(_FORMATS[kind]))

    def _string(self) -> str:
        return str(self._take(self._scalar("<Q")), encoding="utf-8")

    def _scalar(self, layout: str) -> Any:
        value = struct.unpack_from(layout, self._data, self._at)[0]
        self._at += struct.calcsize(layout)
        return value

    def _take(self, length: int) -> memoryview:
        start = self._at
        self._skip(length)
        return self._data[start : self._at]

    def _skip(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise ValueError(f"the header goes on after byte {len(self._data)}")
        self._at += length
